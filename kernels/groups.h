// Rows by class and falling score, where every suppression starts; blocks of boxes, with which it goes on.
//
// Include this file first: the pragma must come before all code. A product and a sum may not become one fused operation,
// so that an overlap is rounded as torch rounds it and equals the threshold here exactly when it does there.
#pragma once
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <cstring>
#include <numeric>
#include <optional>

#include "common.h"

namespace visdet {

constexpr int64_t kBlock = 16;

// Before a loop over a block: it shall become vector instructions, not sixteen copies.
#define LANES _Pragma("GCC unroll 1")

// Bits of a float that sort as unsigned numbers in falling order; minus zero ties with zero.
inline uint32_t falling(float x) {
  uint32_t k;
  x += 0.0f;
  std::memcpy(&k, &x, 4);
  return k >> 31 ? k : ~(k | 0x80000000u);
}
inline uint64_t falling(double x) {
  uint64_t k;
  x += 0.0;
  std::memcpy(&k, &x, 8);
  return k >> 63 ? k : ~(k | 0x8000000000000000u);
}

// Rows by falling score, ties by lower row: a radix sort of 11 bits a pass; passes in which all keys agree are left out.
template <class T>
std::vector<int32_t> by_score(const T* scores, int64_t n) {
  using Key = decltype(falling(T(0)));
  constexpr int kBits = 11, kSize = 1 << kBits, kPasses = (8 * sizeof(Key) + kBits - 1) / kBits;
  struct Item {
    Key key;
    int32_t row;
  };
  std::vector<Item> a(n), b;
  for (int64_t i = 0; i < n; ++i) a[i] = {falling(scores[i]), static_cast<int32_t>(i)};
  if (n < 512) {
    std::sort(a.begin(), a.end(), [](const Item& p, const Item& q) { return p.key != q.key ? p.key < q.key : p.row < q.row; });
  } else {
    b.resize(n);
    std::vector<int32_t> count(kPasses * kSize, 0);
    for (const Item& o : a)
      for (int p = 0; p < kPasses; ++p) ++count[p * kSize + (o.key >> (p * kBits)) % kSize];
    for (int p = 0; p < kPasses; ++p) {
      int32_t *c = &count[p * kSize], sum = 0;
      if (c[(a[0].key >> (p * kBits)) % kSize] == n) continue;
      for (int k = 0; k < kSize; ++k) sum += std::exchange(c[k], sum);
      for (const Item& o : a) b[c[(o.key >> (p * kBits)) % kSize]++] = o;
      a.swap(b);
    }
  }
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = a[i].row;
  return order;
}

inline std::vector<int32_t> by_score(const Tensor& scores) {
  std::vector<int32_t> order;
  float_or_double(scores, "scores", [&](auto zero) {
    order = by_score(scores.const_data_ptr<decltype(zero)>(), scores.size(0));
  });
  return order;
}

// Classes: `rows` holds them one after another, each in the order given; class g is rows[start[g]] .. rows[start[g + 1]].
struct Groups {
  std::vector<int32_t> rows;
  std::vector<int64_t> start;
  int64_t size() const { return static_cast<int64_t>(start.size()) - 1; }
};

// Labels in a range not much wider than their number are counted, others are sorted.
inline Groups by_class(const int64_t* labels, const std::vector<int32_t>& order) {
  const int64_t n = order.size();
  Groups g{order, {0}};
  if (labels && n) {
    const auto [low, high] = std::minmax_element(labels, labels + n);
    const uint64_t lo = *low, range = static_cast<uint64_t>(*high) - lo;
    if (range < static_cast<uint64_t>(4 * n + 1024)) {
      std::vector<int32_t> at(range + 2, 0);
      for (int64_t i = 0; i < n; ++i) ++at[labels[i] - lo + 1];
      std::partial_sum(at.begin(), at.end(), at.begin());
      for (int32_t row : order) g.rows[at[labels[row] - lo]++] = row;
    } else {
      std::stable_sort(g.rows.begin(), g.rows.end(), [&](int32_t a, int32_t b) { return labels[a] < labels[b]; });
    }
    for (int64_t i = 1; i < n; ++i)
      if (labels[g.rows[i]] != labels[g.rows[i - 1]]) g.start.push_back(i);
  }
  if (n) g.start.push_back(n);
  return g;
}

// f(first, last) over the classes: in parallel where there is work enough to pay for waking threads.
template <class F>
void over_groups(const Groups& g, F&& f) {
  const int64_t n = g.rows.size(), groups = g.size();
  torch::stable::parallel_for(0, groups, n < 2048 ? std::max<int64_t>(groups, 1) : 1, f);
}

// Sixteen boxes, column by column; places not taken hold a box that overlaps nothing.
template <class T>
struct alignas(64) Block {
  T x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];

  Block() {
    const T far = std::numeric_limits<T>::max();
    LANES for (int64_t k = 0; k < kBlock; ++k) x1[k] = y1[k] = far, x2[k] = y2[k] = -far, area[k] = T(0);
  }

  void set(int64_t k, const T* b) {
    x1[k] = b[0], y1[k] = b[1], x2[k] = b[2], y2[k] = b[3], area[k] = (b[2] - b[0]) * (b[3] - b[1]);
  }

  // Intersections with a box; is there any?
  bool meet(const T* b, T* inter) const {
    const T bx1 = b[0], by1 = b[1], bx2 = b[2], by2 = b[3];
    int32_t any = 0;
    LANES for (int64_t k = 0; k < kBlock; ++k) {
      const T w = std::max(T(0), std::min(bx2, x2[k]) - std::max(bx1, x1[k]));
      const T h = std::max(T(0), std::min(by2, y2[k]) - std::max(by1, y1[k]));
      inter[k] = w * h;
      const int32_t hit = inter[k] > T(0);
      any |= hit;
    }
    return any;
  }
};

// The largest T not above the threshold: `iou > thr` then means the same in T as in double.
template <class T>
T not_above(double thr) {
  T t = static_cast<T>(thr);
  return static_cast<double>(t) > thr ? std::nextafter(t, std::numeric_limits<T>::lowest()) : t;
}

// Are all numbers finite (or, where infinities are allowed, none NaN)?
template <class T>
bool sound(const T* x, int64_t n, bool infinite = false) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= infinite ? x[i] != x[i] : !(x[i] - x[i] == T(0));
  return !bad;
}

// Boxes (N,columns), scores (N,) and labels (N,) or none, of the types kernels take, and sound
inline void check_rows(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, int64_t columns = 4) {
  check_dense(boxes, "boxes"), check_dense(scores, "scores");
  const int64_t n = scores.size(0);
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == columns && scores.dim() == 1 && boxes.size(0) == n, "rows of boxes and scores differ");
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "too many boxes");
  if (labels) {
    check_dense(*labels, "labels"), check_type(*labels, ScalarType::Long, "labels");
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == n, "labels must be (N,)");
  }
  bool ok = true;
  float_or_double(boxes, "boxes", [&](auto z) { ok &= sound(boxes.const_data_ptr<decltype(z)>(), columns * n); });
  float_or_double(scores, "scores", [&](auto z) { ok &= sound(scores.const_data_ptr<decltype(z)>(), n, true); });
  STD_TORCH_CHECK(ok, "boxes or scores are not finite");
}

// The rows `take(row)` says yes to, in the order given, at most `most` of them (all if negative)
template <class F>
Tensor chosen(const std::vector<int32_t>& order, int64_t most, F&& take) {
  std::vector<int64_t> rows;
  for (int32_t row : order) {
    if (static_cast<int64_t>(rows.size()) == most) break;
    if (take(row)) rows.push_back(row);
  }
  Tensor res = torch::stable::empty({static_cast<int64_t>(rows.size())}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), res.mutable_data_ptr<int64_t>());
  return res;
}

}  // namespace visdet
