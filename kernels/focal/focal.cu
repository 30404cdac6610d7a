// Focal losses on a GPU: one walk over the logits, one thread an entry at a time, the arithmetic of the CPU.
//
// The number of blocks depends on the size of the table only. Each leaves one partial sum, and a single block adds those in
// order, so nothing is added atomically and a result can be had again bit by bit.
#include "args.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace visdet::focal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 2048;

// Pointers that are not needed are null. `up` is one number or, with `up_each`, a table.
template <class T, class C>
struct Walk {
  const T* x;
  const int64_t* labels;
  const C *quality, *weight, *up;
  bool up_each;
  C scale;
  int64_t size, classes;
  Shape shape;
  C* each;
  T* grad;
  double* sums;
};

// The sum over a block, in thread 0
__device__ inline double block_sum(double v) {
  __shared__ double part[kThreads];
  part[threadIdx.x] = v;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
  }
  __syncthreads();
  return part[0];
}

template <class C>
__device__ inline void without_target(const Shape& s, C x, C& loss, C& grad) {
  const C gamma = static_cast<C>(s.gamma), e = exp(-fabs(x)), t = log1p(e), r = C(1) / (C(1) + e);
  const bool up = x > C(0);
  const C p = up ? r : e * r, n = up ? e * r : r, soft = (up ? x : C(0)) + t;
  const C m = static_cast<C>(s.neg) * (s.gamma == 2 ? p * p : s.gamma == 0 ? C(1) : exp(-gamma * ((up ? C(0) : -x) + t)));
  loss = m * soft, grad = m * (gamma * n * soft + p);
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads) walk(const Walk<T, C> a) {
  const bool narrow_index = a.size <= 0xffffffffLL;
  const C factor = a.up && !a.up_each ? a.scale * *a.up : a.scale;
  C total = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.size; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = narrow_index ? static_cast<uint32_t>(i) / static_cast<uint32_t>(a.classes) : i / a.classes;
    const C x = vec::wide(a.x[i]), y = a.quality ? a.quality[row] : C(1);
    C l, g;
    if (a.labels[row] == i - row * a.classes && has_target(a.shape.kind, y)) at_target<C>(a.shape, x, y, l, g);
    else without_target<C>(a.shape, x, l, g);
    const C w = a.weight ? factor * a.weight[row] : factor;
    total += l * w;
    if (a.each) a.each[i] = l * w;
    if (a.grad) vec::narrow(g * w * (a.up_each ? a.up[i] : C(1)), a.grad[i]);
  }
  if (!a.sums) return;
  const double sum = block_sum(total);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

template <class C>
__global__ void __launch_bounds__(kThreads) finish(const double* sums, int64_t n, C* out) {
  double v = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) v += sums[i];
  const double sum = block_sum(v);
  if (threadIdx.x == 0) *out = static_cast<C>(sum);
}

void same_device(const Tensor& x, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), "all tensors must be on one GPU");
}

// Null pointers where `sum`, `each`, `grad` or `up` is none
void launch(const Tensor& x, const Tensor& labels, const Maybe& quality, const Maybe& weight, const Maybe& up, const Shape& shape, double scale,
            Tensor* sum, Tensor* each, Tensor* grad) {
  check_table(x, labels), same_device(x, labels);
  for (const Maybe* o : {&quality, &weight, &up})
    if (*o) same_device(x, **o);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t size = x.numel(), rows = x.size(0);
  const int64_t blocks = std::clamp<int64_t>((size + kThreads - 1) / kThreads, 1, kMostBlocks);
  const Tensor sums = torch::stable::new_empty(x, {blocks}, ScalarType::Double);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  by_type(x, [&]<class T, class C>(T, C) {
    const bool up_each = up && up->dim() > 0;
    const Walk<T, C> a{static_cast<const T*>(x.const_data_ptr()), labels.const_data_ptr<int64_t>(), column<C>(quality, x, rows, "quality"),
                       column<C>(weight, x, rows, "weight"), column<C>(up, x, up_each ? size : 1, "up"), up_each, static_cast<C>(scale), size,
                       std::max<int64_t>(x.size(1), 1), shape, each ? static_cast<C*>(each->mutable_data_ptr()) : nullptr,
                       grad ? static_cast<T*>(grad->mutable_data_ptr()) : nullptr, sum ? sums.mutable_data_ptr<double>() : nullptr};
    walk<T, C><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (!sum) return;
    finish<C><<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sums.const_data_ptr<double>(), blocks, static_cast<C*>(sum->mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<Tensor, Tensor> focal_sum(const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg,
                                     double pos, double gamma, double scale, bool ahead) {
  Tensor sum = torch::stable::new_empty(x, {}, sum_type(x));
  Tensor grad = ahead ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  launch(x, labels, quality, weight, std::nullopt, {kind, neg, pos, gamma}, scale, &sum, nullptr, ahead ? &grad : nullptr);
  return {sum, grad};
}

Tensor focal_each(const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg, double pos, double gamma,
                  double scale) {
  Tensor each = torch::stable::new_empty(x, x.sizes(), sum_type(x));
  launch(x, labels, quality, weight, std::nullopt, {kind, neg, pos, gamma}, scale, nullptr, &each, nullptr);
  return each;
}

Tensor focal_backward(const Tensor& up, const Tensor& x, const Tensor& labels, Maybe quality, Maybe weight, int64_t kind, double neg,
                      double pos, double gamma, double scale) {
  Tensor grad = torch::stable::empty_like(x);
  launch(x, labels, quality, weight, up, {kind, neg, pos, gamma}, scale, nullptr, nullptr, &grad);
  return grad;
}

}  // namespace
}  // namespace visdet::focal

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("focal_sum", TORCH_BOX(&visdet::focal::focal_sum));
  m.impl("focal_each", TORCH_BOX(&visdet::focal::focal_each));
  m.impl("focal_backward", TORCH_BOX(&visdet::focal::focal_backward));
}
