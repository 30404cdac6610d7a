// Greedy suppression within classes, for boxes sorted by class and falling score.
//
// One block of threads does one class, 256 boxes a round, one a thread. A thread compares its box with the boxes kept so
// far, which pass through shared memory, and then with the earlier ones of its round, of which it remembers by bit which
// overlap it. The eight warps settle their boxes one after another: what survives in a warp is one ballot. Nothing is
// counted across blocks and nothing is known to the host, so nothing waits.
#include "../common.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace visdet {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr uint32_t kAll = 0xffffffffu;

// Operations that are never fused: overlaps are rounded as on the CPU.
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ inline double quotient(double a, double b) { return __ddiv_rn(a, b); }

template <class T>
struct Box {
  T x1, y1, x2, y2;
  __device__ T area() const { return mul(sub(x2, x1), sub(y2, y1)); }
};

template <class T>
__device__ inline bool over(const Box<T>& p, const Box<T>& q, T area, T thr) {
  const T w = sub(p.x2 < q.x2 ? p.x2 : q.x2, p.x1 > q.x1 ? p.x1 : q.x1);
  const T h = sub(p.y2 < q.y2 ? p.y2 : q.y2, p.y1 > q.y1 ? p.y1 : q.y1);
  if (!(w > T(0) && h > T(0))) return false;
  const T inter = mul(w, h);
  return quotient(inter, sub(add(p.area(), area), inter)) > thr;
}

// The first place after `head` with another label
__device__ inline int64_t end_of(const int64_t* labels, int64_t head, int64_t n) {
  int64_t low = head + 1, high = n;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (labels[mid] == labels[head]) low = mid + 1;
    else high = mid;
  }
  return low;
}

// kept (N,): the boxes kept of each class, from the class's first place on
template <class T>
__global__ void __launch_bounds__(kThreads)
    suppress(const Box<T>* boxes, const int64_t* labels, int64_t n, T thr, Box<T>* kept, bool* keep) {
  __shared__ Box<T> tile[kThreads];
  __shared__ uint32_t alive[kWarps], heads;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * 32;
  if (warp == 0) {
    const int64_t at = chunk + lane;
    const uint32_t found = __ballot_sync(kAll, at < n && (at == 0 || labels[at] != labels[at - 1]));
    if (lane == 0) heads = found;
  }
  __syncthreads();
  for (uint32_t left = heads; left; left &= left - 1) {
    const int64_t head = chunk + __ffs(left) - 1, end = end_of(labels, head, n);
    int64_t count = 0;
    for (int64_t start = head; start < end; start += kThreads) {
      const int64_t i = start + tid;
      const bool mine = i < end;
      const Box<T> box = mine ? boxes[i] : Box<T>{};
      const T area = box.area();
      bool covered = !mine;
      for (int64_t k = 0; k < count; k += kThreads) {
        const int m = static_cast<int>(count - k < kThreads ? count - k : kThreads);
        __syncthreads();
        if (tid < m) tile[tid] = kept[head + k + tid];
        __syncthreads();
        for (int j = 0; j < m && !covered; ++j) covered = over(tile[j], box, area, thr);
      }
      __syncthreads();
      tile[tid] = box;
      __syncthreads();
      uint32_t bits[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        bits[w] = 0;
        for (int j = 0; j < 32 && !covered && w * 32 + j < tid; ++j)
          if (over(tile[w * 32 + j], box, area, thr)) bits[w] |= 1u << j;
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (warp == w) {
#pragma unroll
          for (int e = 0; e < w; ++e) covered |= (bits[e] & alive[e]) != 0;
          for (int j = 0; j < 32; ++j) {
            const uint32_t up = __ballot_sync(kAll, !covered);
            covered |= (up >> j & 1u) && (bits[w] >> j & 1u);
          }
          const uint32_t up = __ballot_sync(kAll, !covered);
          if (lane == 0) alive[w] = up;
        }
        __syncthreads();
      }
      int rank = __popc(alive[warp] & ((1u << lane) - 1)), total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) rank += __popc(alive[w]);
        total += __popc(alive[w]);
      }
      if (!covered) kept[head + count + rank] = box;
      if (mine) keep[i] = !covered;
      count += total;
      __syncthreads();
    }
  }
}

// The largest T not above the threshold: `iou > thr` then means the same in T as in double.
template <class T>
T not_above(double thr) {
  T t = static_cast<T>(thr);
  return static_cast<double>(t) > thr ? std::nextafter(t, std::numeric_limits<T>::lowest()) : t;
}

// boxes (N,4) by class and, within each, by falling score; labels (N,) i64 -> which are kept (N,) bool
Tensor nms_sorted(const Tensor& boxes, const Tensor& labels, double thr) {
  check_dense(boxes, "boxes"), check_dense(labels, "labels"), check_type(labels, ScalarType::Long, "labels");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && labels.dim() == 1 && labels.size(0) == n, "boxes must be (N,4), labels (N,)");
  STD_TORCH_CHECK(labels.is_cuda() && labels.get_device_index() == boxes.get_device_index(), "boxes and labels must be on one GPU");
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  Tensor keep = torch::stable::new_empty(boxes, {n}, ScalarType::Bool);
  if (n == 0) return keep;
  const Tensor kept = torch::stable::new_empty(boxes, {n, 4});
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(boxes.get_device_index(), &stream));
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    suppress<T><<<static_cast<unsigned>((n + 31) / 32), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Box<T>*>(boxes.const_data_ptr()), labels.const_data_ptr<int64_t>(), n, not_above<T>(thr),
        static_cast<Box<T>*>(kept.mutable_data_ptr()), keep.mutable_data_ptr<bool>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return keep;
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("nms_sorted", TORCH_BOX(&visdet::nms_sorted));
}
