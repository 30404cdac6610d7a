// What a focal loss is at the one entry of a row that has a target, for the processor and for the GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "../vecmath.h"

namespace visdet::focal {

// focal: a class and nothing else; quality, varifocal: a class and how good the box is, 0..1
enum Kind : int64_t { kFocal = 0, kQuality = 1, kVarifocal = 2 };

// Every loss is the same where there is no target: neg * p^gamma * softplus(x).
struct Shape {
  int64_t kind;
  double neg, pos, gamma;
};

// Does a row with a class and this quality have a target? NaN does, and shows.
template <class T>
VISDET_BOTH inline bool has_target(int64_t kind, T quality) {
  return kind == kFocal || !(quality <= T(0));
}

// Loss and derivative at logit x with target y (1 for kFocal).
template <class T>
VISDET_BOTH inline void at_target(const Shape& s, T x, T y, T& loss, T& grad) {
  const T gamma = static_cast<T>(s.gamma), e = std::exp(-std::abs(x)), t = std::log1p(e), r = T(1) / (T(1) + e);
  const bool up = x >= T(0);
  const T p = up ? r : e * r, n = up ? e * r : r;  // sigmoid(x), sigmoid(-x)
  if (s.kind == kFocal) {
    const T m = static_cast<T>(s.pos) * std::exp(-gamma * ((up ? x : T(0)) + t)), soft = (up ? T(0) : -x) + t;
    loss = m * soft, grad = -m * (gamma * p * soft + n);
    return;
  }
  const T bce = (up ? (T(1) - y) * x : -y * x) + t, d = up ? (y - T(1)) + n : y - p;
  if (s.kind == kVarifocal) {
    loss = y * bce, grad = -y * d;
    return;
  }
  const T a = std::abs(d), m = std::pow(a, gamma), dm = a > T(0) ? gamma * m / a : T(0);
  loss = m * bce, grad = -m * d - dm * (d > T(0) ? T(1) : T(-1)) * p * n * bce;
}

}  // namespace visdet::focal
