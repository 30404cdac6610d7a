// Elementary functions and half-precision numbers as plain arithmetic, so that a compiler turns loops over them into
// vector instructions without being allowed to reorder sums or to forget about NaN.
//
// Polynomials are minimax fits of the relative error. In float32 every function here is within 2e-7 of the truth, its own
// rounding included; in float64 the functions of the standard library are called.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define VISDET_BOTH __host__ __device__
#else
#define VISDET_BOTH
#endif

namespace visdet::vec {

template <size_t N>
VISDET_BOTH inline float horner(const float (&c)[N], float x) {
  float r = c[N - 1];
  for (size_t i = N - 1; i-- > 0;) r = r * x + c[i];
  return r;
}

// exp(-a) for a >= 0; below exp(-87), the smallest normal number, it stays there.
VISDET_BOTH inline float exp_neg(float a) {
  constexpr float c[] = {1.f, -1.f, 0.499999921f, -0.166664198f, 0.0416682278f, -0.00837484591f, 0.00138368078f};
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the lowest bits
  a = a > 87.f ? 87.f : a;
  const float t = a * 1.44269504f + magic, n = t - magic;
  const float r = (a - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first with few bits
  const uint32_t scale = (127u - (std::bit_cast<uint32_t>(t) - std::bit_cast<uint32_t>(magic))) << 23;
  return horner(c, r) * std::bit_cast<float>(scale);
}

// log(1 + e) for 0 <= e <= 1
VISDET_BOTH inline float log1p_unit(float e) {
  constexpr float c[] = {0.999999995f, -0.499999024f, 0.333299624f, -0.249541336f, 0.196759389f,
                         -0.153055916f, 0.106036532f, -0.056959518f, 0.0198514537f, -0.00324402326f};
  return e * horner(c, e);
}

// atan(y / x) for x > 0; y / x itself is never formed, so it cannot overflow
VISDET_BOTH inline float atan_ratio(float y, float x) {
  constexpr float c[] = {0.999999985f, -0.333330733f, 0.199926194f, -0.142036444f, 0.106409337f,
                         -0.0750429375f, 0.04269151f, -0.0160686232f, 0.00284988818f};
  const float a = std::abs(y), lo = a < x ? a : x, hi = a < x ? x : a, z = lo / hi;
  const float t = z * horner(c, z * z), r = a < x ? t : 1.57079633f - t;
  return std::copysign(r, y);
}

VISDET_BOTH inline double exp_neg(double a) { return std::exp(-a); }
VISDET_BOTH inline double log1p_unit(double e) { return std::log1p(e); }
VISDET_BOTH inline double atan_ratio(double y, double x) { return std::atan(y / x); }

// Numbers of sixteen bits: read as float32, written by rounding to nearest, ties to even.
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

VISDET_BOTH inline float wide(float x) { return x; }
VISDET_BOTH inline double wide(double x) { return x; }
VISDET_BOTH inline float wide(Brain x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
VISDET_BOTH inline float wide(Half x) {
  const uint32_t h = x.bits, mag = (h & 0x7fffu) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(mag) * 0x1p112f);
  return std::bit_cast<float>(((h & 0x7c00u) == 0x7c00u ? mag | 0x7f800000u : finite) | (h & 0x8000u) << 16);
}

VISDET_BOTH inline void narrow(float x, float& out) { out = x; }
VISDET_BOTH inline void narrow(double x, double& out) { out = x; }
VISDET_BOTH inline void narrow(float x, Brain& out) {
  const uint32_t u = std::bit_cast<uint32_t>(x), r = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : r);
}
VISDET_BOTH inline void narrow(float x, Half& out) {
  const uint32_t u = std::bit_cast<uint32_t>(x), a = u & 0x7fffffffu;
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000u;  // multiples of 2^-24
  const uint32_t usual = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
  const uint32_t r = a > 0x7f800000u ? 0x7e00u : a >= 0x477ff000u ? 0x7c00u : a < 0x38800000u ? tiny : usual;
  out.bits = static_cast<uint16_t>(r | (u >> 16 & 0x8000u));
}

}  // namespace visdet::vec
