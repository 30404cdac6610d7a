// Pasting on the GPU: one block a mask and band of rows; threads run along the rows of the visible part of its box.
//
// The arithmetic is that of the CPU, product by product, with every rounding spelt out, so that the compiler's own fusing
// cannot change a result: across first, then down, or all four corners at once where the result is small.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common.h"

namespace visdet {
namespace {

constexpr int kThreads = 128, kBands = 16;

__device__ int64_t whole(float v) { return isnan(v) ? -1000000000 : static_cast<int64_t>(fminf(fmaxf(v, -1e9f), 1e9f)); }

struct Tap {
  int i, j;
  float u, v;
};

// Where position k of n takes its value from, among m.
__device__ Tap tap(int m, float scale, int64_t k) {
  const float at = fmaxf(__fmaf_rn(scale, __fadd_rn(static_cast<float>(k), .5f), -.5f), 0.f);
  const int i = min(static_cast<int>(at), m - 1);
  const float part = fminf(fmaxf(__fsub_rn(at, static_cast<float>(i)), 0.f), 1.f);
  return {i, min(i + 1, m - 1), __fsub_rn(1.f, part), part};
}

// One axis of a box, grown by the ring: first position, number of positions, visible part.
struct Side {
  int64_t start, n, lo, hi;

  __device__ Side(float a, float b, float grow, int64_t size) {
    const float centre = __fmul_rn(__fadd_rn(b, a), .5f);
    const float half = __fmul_rn(__fmul_rn(__fsub_rn(b, a), .5f), grow);
    start = whole(__fsub_rn(centre, half));
    const int64_t last = whole(__fadd_rn(centre, half));
    n = (last > start ? last : start) + 1 - start;
    lo = start > 0 ? start : 0;
    hi = start + n < size ? start + n : size;
  }
};

template <class Out>
__device__ Out result(float v, float thr);
template <>
__device__ bool result<bool>(float v, float thr) { return v > thr; }
template <>
__device__ float result<float>(float v, float) { return v; }

template <class Out>
__global__ void __launch_bounds__(kThreads) paste(Out* out, const float* probs, const float* boxes, int m, int64_t h,
                                                  int64_t w, float grow, float thr) {
  const int64_t i = blockIdx.x;
  const float* b = boxes + 4 * i;
  const Side sx(b[0], b[2], grow, w), sy(b[1], b[3], grow, h);
  const bool small = sx.n + sy.n <= 128;
  const int p = m + 2;  // the square with its ring of zeros
  const float scale_x = __fdiv_rn(static_cast<float>(p), static_cast<float>(sx.n));
  const float scale_y = __fdiv_rn(static_cast<float>(p), static_cast<float>(sy.n));
  auto value = [=](int y, int x) {
    return y > 0 && y <= m && x > 0 && x <= m ? __ldg(probs + (i * m + y - 1) * m + x - 1) : 0.f;
  };
  for (int64_t y = sy.lo + blockIdx.y; y < sy.hi; y += gridDim.y) {
    const Tap ty = tap(p, scale_y, y - sy.start);
    for (int64_t x = sx.lo + threadIdx.x; x < sx.hi; x += kThreads) {
      const Tap tx = tap(p, scale_x, x - sx.start);
      const float a = value(ty.i, tx.i), c = value(ty.i, tx.j), d = value(ty.j, tx.i), e = value(ty.j, tx.j);
      float v;
      if (small) {
        v = __fmaf_rn(__fmul_rn(ty.u, tx.u), a, __fmul_rn(__fmul_rn(ty.u, tx.v), c));
        v = __fmaf_rn(__fmul_rn(ty.v, tx.u), d, v);
        v = __fmaf_rn(__fmul_rn(ty.v, tx.v), e, v);
      } else {
        const float top = __fmaf_rn(a, tx.u, __fmul_rn(c, tx.v)), bottom = __fmaf_rn(d, tx.u, __fmul_rn(e, tx.v));
        v = __fmaf_rn(top, ty.u, __fmul_rn(bottom, ty.v));
      }
      out[(i * h + y) * w + x] = result<Out>(v, thr);
    }
  }
}

// out (N,H,W), zeros on entry: bool for "above the threshold", or f32 for the values themselves
void paste_masks(Tensor out, const Tensor& probs, const Tensor& boxes, double thr) {
  check_dense(out, "out"), check_dense(probs, "probs"), check_dense(boxes, "boxes");
  check_type(probs, ScalarType::Float, "probs"), check_type(boxes, ScalarType::Float, "boxes");
  const int64_t n = probs.size(0), m = probs.size(1);
  STD_TORCH_CHECK(probs.dim() == 3 && probs.size(2) == m && m > 0, "probs must be (N,m,m)");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == n && boxes.size(1) == 4, "boxes must be (N,4)");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == n, "out must be (N,H,W)");
  STD_TORCH_CHECK(out.get_device_index() == probs.get_device_index() && boxes.get_device_index() == probs.get_device_index(),
                  "out, probs and boxes must be on one device");
  const int64_t h = out.size(1), w = out.size(2);
  if (out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(probs.get_device_index());
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(probs.get_device_index(), &stream));
  const float grow = static_cast<float>((m + 2.) / m), above = static_cast<float>(thr);
  const float *p = probs.const_data_ptr<float>(), *b = boxes.const_data_ptr<float>();
  const dim3 grid(static_cast<unsigned>(n), kBands);
  auto run = [&](auto* o) {
    paste<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(o, p, b, static_cast<int>(m), h, w, grow, above);
  };
  if (out.scalar_type() == ScalarType::Float) {
    run(out.mutable_data_ptr<float>());
  } else {
    check_type(out, ScalarType::Bool, "out");
    run(out.mutable_data_ptr<bool>());
  }
  const cudaError_t failed = cudaGetLastError();
  STD_TORCH_CHECK(failed == cudaSuccess, "paste_masks: ", cudaGetErrorString(failed));
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("paste_masks", TORCH_BOX(&visdet::paste_masks));
}
