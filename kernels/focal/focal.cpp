// Focal losses of a table of logits whose rows have at most one target each, with their gradients.
//
// The table is read once, as a line of blocks of 1024 numbers that stay in the nearest cache. A block is first treated as
// if nothing had a target, which is the same arithmetic for each entry and runs on whole vectors; then the few entries
// with a target are overwritten; then it is weighted, summed and its gradient written. The gradient of a sum is known but
// for one factor, the gradient that arrives at the sum, so the forward pass writes it and the backward pass multiplies.
//
// Sums: float32 lanes within a block, float64 over blocks and over chunks. The chunks do not depend on the number of
// threads, so neither does the result.
#include "args.h"

namespace visdet::focal {

using namespace vec;

constexpr int64_t kBlock = 1024, kLanes = 16, kChunk = 16 * kBlock;

enum class Power { zero, one, two, any };

// Loss and derivative of entries without a target: with m = neg * p^gamma, m * softplus(x) and
// m * (gamma * (1-p) * softplus(x) + p). For any other gamma, p^gamma = exp(-gamma * softplus(-x)).
template <Power power, bool with_grad, class C>
void background(const C* __restrict__ x, C* __restrict__ l, C* __restrict__ g, C neg, C gamma) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const C e = exp_neg(std::abs(x[i])), t = log1p_unit(e), r = C(1) / (C(1) + e);
    const bool up = x[i] > C(0);
    const C p = up ? r : e * r, n = up ? e * r : r, soft = (up ? x[i] : C(0)) + t;
    C m = neg;
    if constexpr (power == Power::one) m *= p;
    if constexpr (power == Power::two) m *= p * p;
    if constexpr (power == Power::any) m *= exp_neg(gamma * ((up ? C(0) : -x[i]) + t));
    l[i] = m * soft;
    if constexpr (with_grad) g[i] = m * (gamma * n * soft + p);
  }
}

template <class C>
using Background = void (*)(const C*, C*, C*, C, C);

template <class C>
Background<C> background_for(double gamma, bool with_grad) {
  if (gamma == 0) return with_grad ? background<Power::zero, true, C> : background<Power::zero, false, C>;
  if (gamma == 1) return with_grad ? background<Power::one, true, C> : background<Power::one, false, C>;
  if (gamma == 2) return with_grad ? background<Power::two, true, C> : background<Power::two, false, C>;
  return with_grad ? background<Power::any, true, C> : background<Power::any, false, C>;
}

// One call: T is what the logits are stored as, C what is computed with. Pointers that are not needed are null.
template <class T, class C>
struct Table {
  const T* x;
  const int64_t* labels;
  const C *quality, *weight, *up_each;  // (R,), (R,), (R,K)
  C factor;                             // Of all entries
  int64_t size, classes;
  Shape shape;
  C* each;  // Losses
  T* grad;

  // Factors of the block's entries from each row's weight, and entries that have a target.
  void rows(int64_t start, int64_t end, const C* bx, C* l, C* g, C* w) const {
    for (int64_t r = start / classes; r * classes < end; ++r) {
      const int64_t from = std::max(start, r * classes), to = std::min(end, (r + 1) * classes), hit = r * classes + labels[r];
      if (weight) std::fill(w + (from - start), w + (to - start), factor * weight[r]);
      if (labels[r] < 0 || labels[r] >= classes || hit < from || hit >= to) continue;
      const C y = quality ? quality[r] : C(1);
      if (!has_target(shape.kind, y)) continue;
      double loss, slope;
      at_target<double>(shape, bx[hit - start], y, loss, slope);
      l[hit - start] = static_cast<C>(loss), g[hit - start] = static_cast<C>(slope);
    }
  }

  double block(int64_t start, int64_t end, Background<C> fill) const {
    alignas(64) C bx[kBlock], l[kBlock], g[kBlock], w[kBlock];
    const int64_t n = end - start;
    for (int64_t i = 0; i < n; ++i) bx[i] = wide(x[start + i]);
    std::fill(bx + n, bx + kBlock, C(0));
    std::fill(w, w + n, factor), std::fill(w + n, w + kBlock, C(0));
    fill(bx, l, g, static_cast<C>(shape.neg), static_cast<C>(shape.gamma));
    rows(start, end, bx, l, g, w);
    if (each) for (int64_t i = 0; i < n; ++i) each[start + i] = l[i] * w[i];
    if (grad && up_each) for (int64_t i = 0; i < n; ++i) w[i] *= up_each[start + i];
    if (grad) for (int64_t i = 0; i < n; ++i) narrow(g[i] * w[i], grad[start + i]);
    C lanes[kLanes] = {};
    for (int64_t i = 0; i < kBlock; i += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += l[i + k] * w[i + k];
    double total = 0;
    for (int64_t k = 0; k < kLanes; ++k) total += lanes[k];
    return total;
  }

  double run() const {
    const Background<C> fill = background_for<C>(shape.gamma, grad != nullptr);
    std::vector<double> sums((size + kChunk - 1) / kChunk);
    torch::stable::parallel_for(0, sums.size(), 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const int64_t last = std::min(size, (c + 1) * kChunk);
        for (int64_t s = c * kChunk; s < last; s += kBlock) sums[c] += block(s, std::min(last, s + kBlock), fill);
      }
    });
    double total = 0;
    for (double s : sums) total += s;
    return total;
  }
};

template <class T, class C>
Table<T, C> table(const Tensor& x, const Tensor& labels, const Maybe& quality, const Maybe& weight, const Shape& s, double scale) {
  check_table(x, labels);
  const int64_t rows = x.size(0);
  return {static_cast<const T*>(x.const_data_ptr()), labels.const_data_ptr<int64_t>(), column<C>(quality, x, rows, "quality"),
          column<C>(weight, x, rows, "weight"), nullptr, static_cast<C>(scale), x.numel(), std::max<int64_t>(x.size(1), 1), s, nullptr, nullptr};
}

// -> the sum, and its gradient if `ahead` (else an empty tensor)
std::tuple<Tensor, Tensor> focal_sum(const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg,
                                     double pos, double gamma, double scale, bool ahead) {
  Tensor sum = torch::stable::new_empty(x, {}, sum_type(x));
  Tensor grad = ahead ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  by_type(x, [&]<class T, class C>(T, C) {
    auto t = table<T, C>(x, labels, quality, weight, {kind, neg, pos, gamma}, scale);
    if (ahead) t.grad = static_cast<T*>(grad.mutable_data_ptr());
    *static_cast<C*>(sum.mutable_data_ptr()) = static_cast<C>(t.run());
  });
  return {sum, grad};
}

// -> the loss of each entry (R,K)
Tensor focal_each(const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg, double pos, double gamma,
                  double scale) {
  Tensor each = torch::stable::new_empty(x, x.sizes(), sum_type(x));
  by_type(x, [&]<class T, class C>(T, C) {
    auto t = table<T, C>(x, labels, quality, weight, {kind, neg, pos, gamma}, scale);
    t.each = static_cast<C*>(each.mutable_data_ptr());
    t.run();
  });
  return each;
}

// up: () or (R,K) -> the gradient (R,K), computed from the logits
Tensor focal_backward(const Tensor& up, const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg,
                      double pos, double gamma, double scale) {
  Tensor grad = torch::stable::empty_like(x);
  by_type(x, [&]<class T, class C>(T, C) {
    auto t = table<T, C>(x, labels, quality, weight, {kind, neg, pos, gamma}, scale);
    const C* u = column<C>(up, x, up.dim() ? x.numel() : 1, "up");
    if (up.dim()) t.up_each = u;
    else t.factor *= *u;
    t.grad = static_cast<T*>(grad.mutable_data_ptr());
    t.run();
  });
  return grad;
}

}  // namespace visdet::focal

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("focal_sum(Tensor x, Tensor labels, Tensor? quality, Tensor? weight, int kind, float neg, float pos, float gamma, float scale, bool ahead) -> (Tensor, Tensor)");
  m.def("focal_each(Tensor x, Tensor labels, Tensor? quality, Tensor? weight, int kind, float neg, float pos, float gamma, float scale) -> Tensor");
  m.def("focal_backward(Tensor up, Tensor x, Tensor labels, Tensor? quality, Tensor? weight, int kind, float neg, float pos, float gamma, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("focal_sum", TORCH_BOX(&visdet::focal::focal_sum));
  m.impl("focal_each", TORCH_BOX(&visdet::focal::focal_each));
  m.impl("focal_backward", TORCH_BOX(&visdet::focal::focal_backward));
}
