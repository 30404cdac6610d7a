// The CUDA side: a thread a box goes over the objects, a block an object goes over the boxes, and claims compare the two.
// Nothing is added up or raced for, so the result is always the same. Multiplications are rounded on their own, as on the
// CPU, or overlaps would differ in the last bit.
#include "../common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cuda_runtime.h>
#include <optional>
#include <tuple>

namespace visdet {
namespace {

constexpr int kThreads = 256;

__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }

// Like std::min and std::max: the first unless the second is truly less (greater), so a NaN in the first place stays.
template <class T>
__device__ inline T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ inline T most(T a, T b) {
  return a < b ? b : a;
}

template <class T>
struct Box {
  T x1, y1, x2, y2, area;
  __device__ explicit Box(const T* p) : x1(p[0]), y1(p[1]), x2(p[2]), y2(p[3]) {
    area = times(most(x2 - x1, T(0)), most(y2 - y1, T(0)));
  }
};

template <class T>
__device__ inline T overlap(const Box<T>& b, const Box<T>& g) {
  const T h = most(least(b.y2, g.y2) - most(b.y1, g.y1), T(0)), w = most(least(b.x2, g.x2) - most(b.x1, g.x1), T(0));
  const T inter = times(h, w);
  return inter / most((b.area + g.area) - inter, T(1e-9));
}

template <class T>
__device__ inline bool above(T x, T y) {
  return x > y || (x != x && y == y);
}

// Does (v, i) come before (w, j)? A higher value, or the lower index of two equals; -1 is no index at all.
template <class T>
__device__ inline bool before(T v, int64_t i, T w, int64_t j) {
  if (i < 0 || j < 0) return j < 0 && i >= 0;
  if (above(v, w)) return true;
  return !above(w, v) && i < j;
}

// grid (blocks of boxes, images)
template <class T>
__global__ void of_boxes(const T* boxes, const T* gts, const bool* valid, int64_t n, int64_t m, int64_t step, T* best, int64_t* arg) {
  const int64_t image = blockIdx.y, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const Box<T> b(boxes + (image * step + i) * 4);
  T v = -1;
  int64_t at = -1;
  for (int64_t j = 0; j < m; ++j) {
    if (!valid[image * m + j]) continue;
    const T x = overlap(b, Box<T>(gts + (image * m + j) * 4));
    if (above(x, v)) v = x, at = j;
  }
  best[image * n + i] = v, arg[image * n + i] = at;
}

// grid (objects, images)
template <class T>
__global__ void of_objects(const T* boxes, const T* gts, const bool* valid, int64_t n, int64_t m, int64_t step, T* top, int64_t* arg) {
  __shared__ T values[kThreads];
  __shared__ int64_t places[kThreads];
  const int64_t image = blockIdx.y, o = image * m + blockIdx.x;
  T v = -1;
  int64_t at = -1;
  if (valid[o]) {
    const Box<T> g(gts + o * 4);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const T x = overlap(Box<T>(boxes + (image * step + i) * 4), g);
      if (above(x, v)) v = x, at = i;
    }
  }
  values[threadIdx.x] = v, places[threadIdx.x] = at;
  __syncthreads();
  for (int k = kThreads / 2; k > 0; k /= 2) {
    if (threadIdx.x < k && before(values[threadIdx.x + k], places[threadIdx.x + k], values[threadIdx.x], places[threadIdx.x]))
      values[threadIdx.x] = values[threadIdx.x + k], places[threadIdx.x] = places[threadIdx.x + k];
    __syncthreads();
  }
  if (threadIdx.x == 0) top[o] = values[0], arg[o] = places[0];
}

template <class T>
__global__ void claims(const T* boxes, const T* gts, const bool* valid, const T* top, int64_t n, int64_t m, int64_t step, double at_least, int64_t* out) {
  const int64_t image = blockIdx.y, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const Box<T> b(boxes + (image * step + i) * 4);
  int64_t last = -1;
  for (int64_t j = 0; j < m; ++j) {
    const T want = top[image * m + j];
    if (valid[image * m + j] && want > 0 && want >= at_least && overlap(b, Box<T>(gts + (image * m + j) * 4)) == want) last = j;
  }
  out[image * n + i] = last;
}

cudaStream_t stream_of(const Tensor& t) {
  void* s = nullptr;
  aoti_torch_get_current_cuda_stream(t.get_device_index(), &s);
  return static_cast<cudaStream_t>(s);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_iou_cuda(const Tensor& boxes, const Tensor& gts, const Tensor& valid,
                                                                 std::optional<double> at_least) {
  check_dense(boxes, "boxes"), check_dense(gts, "gts"), check_dense(valid, "valid");
  check_type(valid, ScalarType::Bool, "valid"), check_type(gts, boxes.scalar_type(), "gts");
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be (1|B,N,4)");
  STD_TORCH_CHECK(gts.dim() == 3 && gts.size(2) == 4 && valid.dim() == 2, "gts must be (B,M,4), valid (B,M)");
  const int64_t groups = boxes.size(0), images = gts.size(0), n = boxes.size(1), m = gts.size(1), step = groups == 1 ? 0 : n;
  STD_TORCH_CHECK(groups == 1 || groups == images, "boxes must be of one image or of as many as gts");
  STD_TORCH_CHECK(valid.size(0) == images && valid.size(1) == m && images < 65536, "valid must match gts");
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const cudaStream_t stream = stream_of(boxes);
  const ScalarType index = ScalarType::Long;
  Tensor best = torch::stable::new_empty(boxes, {images, n}), arg = torch::stable::new_empty(boxes, {images, n}, index);
  Tensor top = torch::stable::new_empty(boxes, {images, m}), top_arg = torch::stable::new_empty(boxes, {images, m}, index);
  Tensor claim = torch::stable::new_empty(boxes, {images, at_least ? n : 0}, index);
  const dim3 by_box((n + kThreads - 1) / kThreads, images), by_object(m, images);
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *b = boxes.const_data_ptr<T>(), *g = gts.const_data_ptr<T>();
    const bool* v = valid.const_data_ptr<bool>();
    if (images && n) of_boxes<T><<<by_box, kThreads, 0, stream>>>(b, g, v, n, m, step, best.mutable_data_ptr<T>(), arg.mutable_data_ptr<int64_t>());
    if (images && m) of_objects<T><<<by_object, kThreads, 0, stream>>>(b, g, v, n, m, step, top.mutable_data_ptr<T>(), top_arg.mutable_data_ptr<int64_t>());
    if (images && n && at_least)
      claims<T><<<by_box, kThreads, 0, stream>>>(b, g, v, top.const_data_ptr<T>(), n, m, step, *at_least, claim.mutable_data_ptr<int64_t>());
  });
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "best_iou did not start on the GPU");
  return {best, arg, top, top_arg, claim};
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("best_iou", TORCH_BOX(&visdet::best_iou_cuda));
}
