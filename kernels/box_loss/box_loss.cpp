// Losses of pairs of boxes by their overlap, with gradients.
//
// Rows of four numbers are turned into columns, 256 rows at a time, so that the arithmetic of one pair becomes vector
// instructions over sixteen. The loss is symmetric, so the gradient by the second boxes is the first's with sides changed.
#include "../common.h"
#include "box_loss.h"

#include <optional>
#include <tuple>

namespace visdet::boxes {

constexpr int64_t kRows = 256, kRowChunk = 16 * kRows, kSumLanes = 16;

template <int64_t kind, bool with_grad, class T>
void pairs(const T (&a)[4][kRows], const T (&b)[4][kRows], T (&loss)[kRows], T (&g)[4][kRows]) {
  for (int64_t i = 0; i < kRows; ++i) {
    T l, g0 = 0, g1 = 0, g2 = 0, g3 = 0;
    pair_loss<kind, with_grad, T>(a[0][i], a[1][i], a[2][i], a[3][i], b[0][i], b[1][i], b[2][i], b[3][i], l, g0, g1, g2, g3);
    loss[i] = l;
    if constexpr (with_grad) g[0][i] = g0, g[1][i] = g1, g[2][i] = g2, g[3][i] = g3;
  }
}

template <class T>
using Pairs = void (*)(const T (&)[4][kRows], const T (&)[4][kRows], T (&)[kRows], T (&)[4][kRows]);

template <class T>
Pairs<T> pairs_for(int64_t kind, bool with_grad) {
  switch (kind) {
    case kIoU: return with_grad ? pairs<kIoU, true, T> : pairs<kIoU, false, T>;
    case kGIoU: return with_grad ? pairs<kGIoU, true, T> : pairs<kGIoU, false, T>;
    case kDIoU: return with_grad ? pairs<kDIoU, true, T> : pairs<kDIoU, false, T>;
    case kCIoU: return with_grad ? pairs<kCIoU, true, T> : pairs<kCIoU, false, T>;
    default: STD_TORCH_CHECK(false, "kind of overlap must be 0 to 3");
  }
}

template <class T>
void columns(const T* rows, int64_t n, T (&out)[4][kRows]) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < 4; ++c) out[c][i] = rows[4 * i + c];
  for (int64_t c = 0; c < 4; ++c) std::fill(out[c] + n, out[c] + kRows, T(0));
}

template <class T>
void weighted_rows(const T (&g)[4][kRows], const T (&w)[kRows], int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < 4; ++c) out[4 * i + c] = g[c][i] * w[i];
}

template <class T>
struct Pairing {
  const T *x, *y, *weight;  // (N,4), (N,4), (N,) or null
  T factor;
  T *each, *gx, *gy;  // (N,), (N,4), (N,4); null where not wanted
  Pairs<T> plain, sloped;

  double block(int64_t s, int64_t n) const {
    alignas(64) T a[4][kRows], b[4][kRows], g[4][kRows], l[kRows], w[kRows];
    columns(x + 4 * s, n, a), columns(y + 4 * s, n, b);
    for (int64_t i = 0; i < kRows; ++i) w[i] = i < n ? factor : T(0);
    if (weight) for (int64_t i = 0; i < n; ++i) w[i] *= weight[s + i];
    if (gy) sloped(b, a, l, g), weighted_rows(g, w, n, gy + 4 * s);
    if (gx) sloped(a, b, l, g), weighted_rows(g, w, n, gx + 4 * s);
    if (!gx && !gy) plain(a, b, l, g);
    for (int64_t i = 0; i < kRows; ++i) l[i] *= w[i];
    if (each) std::copy(l, l + n, each + s);
    T lanes[kSumLanes] = {};
    for (int64_t i = 0; i < kRows; i += kSumLanes)
      for (int64_t k = 0; k < kSumLanes; ++k) lanes[k] += l[i + k];
    double total = 0;
    for (T v : lanes) total += v;
    return total;
  }

  double run(int64_t size) const {
    std::vector<double> sums((size + kRowChunk - 1) / kRowChunk);
    torch::stable::parallel_for(0, sums.size(), 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const int64_t last = std::min(size, (c + 1) * kRowChunk);
        for (int64_t s = c * kRowChunk; s < last; s += kRows) sums[c] += block(s, std::min(kRows, last - s));
      }
    });
    double total = 0;
    for (double s : sums) total += s;
    return total;
  }
};

// x, y (N,4) f32|f64, weight (N,) -> the sum () or, with `each`, the losses (N,); gradients by x and y where wanted, else empty
std::tuple<Tensor, Tensor, Tensor> box_loss(const Tensor& x, const Tensor& y, std::optional<Tensor> weight, int64_t kind, double scale,
                                            bool each, bool by_x, bool by_y) {
  check_dense(x, "x"), check_dense(y, "y"), check_type(y, x.scalar_type(), "y");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == 4 && y.dim() == 2 && y.size(1) == 4 && x.size(0) == y.size(0), "boxes must be (N,4)");
  const int64_t n = x.size(0);
  if (weight) {
    check_dense(*weight, "weight"), check_type(*weight, x.scalar_type(), "weight");
    STD_TORCH_CHECK(weight->numel() == n, "weight must be (N,)");
  }
  Tensor loss = each ? torch::stable::new_empty(x, {n}) : torch::stable::new_empty(x, {});
  Tensor gx = by_x ? torch::stable::new_empty(x, {n, 4}) : torch::stable::new_empty(x, {0});
  Tensor gy = by_y ? torch::stable::new_empty(x, {n, 4}) : torch::stable::new_empty(x, {0});
  float_or_double(x, "boxes", [&](auto zero) {
    using T = decltype(zero);
    Pairing<T> p{x.const_data_ptr<T>(), y.const_data_ptr<T>(), weight ? weight->const_data_ptr<T>() : nullptr, static_cast<T>(scale),
                 each ? loss.mutable_data_ptr<T>() : nullptr, by_x ? gx.mutable_data_ptr<T>() : nullptr,
                 by_y ? gy.mutable_data_ptr<T>() : nullptr, pairs_for<T>(kind, false), pairs_for<T>(kind, true)};
    const double total = p.run(n);
    if (!each) *loss.mutable_data_ptr<T>() = static_cast<T>(total);
  });
  return {loss, gx, gy};
}

}  // namespace visdet::boxes

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("box_loss(Tensor x, Tensor y, Tensor? weight, int kind, float scale, bool each, bool by_x, bool by_y) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("box_loss", TORCH_BOX(&visdet::boxes::box_loss));
}
