// Multi-scale deformable attention on GPUs: a warp for each query and head, a lane for each channel.
//
// All lanes of a warp read the same four cells, so a reading is four stretches of neighbouring addresses. Where to read is
// worked out by every lane, which is cheaper than sharing it. Backward, three sums over channels (weight, x, y) leave the
// warp by shuffles, and the gradient of the cells is added atomically: its last bits depend on the order of the warps.
#include "../common.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace visdet {
namespace {

constexpr int kWarp = 32, kThreads = 256, kMaxLevels = 16;

struct Levels {
  int h[kMaxLevels], w[kMaxLevels], start[kMaxLevels];
};

struct Sizes {
  int64_t batch, cells, heads, channels, queries;
  int levels, points;  // points of one level
};

template <class T>
__device__ T warp_sum(T v) {
  for (int o = kWarp / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// One point: its position inside the square of four cells, and for each cell its number or -1.
template <class T>
struct Point {
  T x, y;
  int cell[4];

  __device__ Point(const T* loc, int h, int w, int start) {
    const T px = loc[0] * w - T(0.5), py = loc[1] * h - T(0.5), lx = floor(px), ly = floor(py);
    x = px - lx, y = py - ly;
    const bool in = px >= T(-1) && px < T(w) && py >= T(-1) && py < T(h);  // false for NaN
    const int ix = in ? static_cast<int>(lx) : -2, iy = in ? static_cast<int>(ly) : -2;
    for (int i = 0; i < 4; ++i) {
      const int cx = ix + i % 2, cy = iy + i / 2;
      cell[i] = in && cx >= 0 && cx < w && cy >= 0 && cy < h ? start + cy * w + cx : -1;
    }
  }
  __device__ T share_x(int i) const { return i % 2 ? x : 1 - x; }
  __device__ T share_y(int i) const { return i / 2 ? y : 1 - y; }
};

template <class T>
__global__ void forward(Sizes s, Levels m, const T* value, const T* loc, const T* weight, T* out) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (at >= s.batch * s.queries * s.heads) return;
  const int64_t h = at % s.heads, b = at / s.heads / s.queries, row = s.heads * s.channels, n = int64_t(s.levels) * s.points;
  const T* v = value + b * s.cells * row + h * s.channels;
  for (int64_t c = threadIdx.x % kWarp; c < s.channels; c += kWarp) {
    T sum = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int l = k / s.points;
      const Point<T> p(loc + 2 * (at * n + k), m.h[l], m.w[l], m.start[l]);
      const T a = weight[at * n + k];
      for (int i = 0; i < 4; ++i) sum += a * p.share_y(i) * p.share_x(i) * (p.cell[i] < 0 ? T(0) : v[p.cell[i] * row + c]);
    }
    out[at * s.channels + c] = sum;
  }
}

template <class T>
__global__ void backward(Sizes s, Levels m, const T* grad, const T* value, const T* loc, const T* weight, T* d_value, T* d_loc, T* d_weight) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (at >= s.batch * s.queries * s.heads) return;  // the same for a whole warp
  const int64_t h = at % s.heads, b = at / s.heads / s.queries, row = s.heads * s.channels, n = int64_t(s.levels) * s.points;
  const int64_t slice = b * s.cells * row + h * s.channels;
  const int lane = threadIdx.x % kWarp;
  for (int64_t k = 0; k < n; ++k) {
    const int l = k / s.points;
    const Point<T> p(loc + 2 * (at * n + k), m.h[l], m.w[l], m.start[l]);
    const T a = weight[at * n + k];
    T sw = 0, sx = 0, sy = 0;
    for (int64_t c = lane; c < s.channels; c += kWarp) {
      const T g = grad[at * s.channels + c];
      for (int i = 0; i < 4; ++i) {
        const T wx = p.share_x(i), wy = p.share_y(i);
        T d = 0;
        if (p.cell[i] >= 0) {
          d = g * value[slice + p.cell[i] * row + c];
          atomicAdd(d_value + slice + p.cell[i] * row + c, a * wy * wx * g);
        }
        sw += wy * wx * d, sx += (i % 2 ? wy : -wy) * d, sy += (i / 2 ? wx : -wx) * d;
      }
    }
    sw = warp_sum(sw), sx = warp_sum(sx), sy = warp_sum(sy);
    if (lane == 0) {
      d_weight[at * n + k] = sw;
      d_loc[2 * (at * n + k)] = a * m.w[l] * sx, d_loc[2 * (at * n + k) + 1] = a * m.h[l] * sy;
    }
  }
}

Sizes check(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights, Levels& m) {
  check_dense(value, "value"), check_dense(locations, "locations"), check_dense(weights, "weights");
  check_type(locations, value.scalar_type(), "locations"), check_type(weights, value.scalar_type(), "weights");
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5, "value (B,S,H,D), locations (B,Q,H,L,P,2), weights (B,Q,H,L,P)");
  STD_TORCH_CHECK(locations.get_device_index() == value.get_device_index() && weights.get_device_index() == value.get_device_index(), "all tensors must be on one device");
  const int64_t levels = shapes.size() / 2;
  STD_TORCH_CHECK(levels <= kMaxLevels, "at most 16 levels");
  int64_t cells = 0;
  for (int64_t l = 0; l < levels; ++l) {
    m.h[l] = shapes[2 * l], m.w[l] = shapes[2 * l + 1], m.start[l] = cells;
    cells += shapes[2 * l] * shapes[2 * l + 1];
  }
  STD_TORCH_CHECK(cells == value.size(1) && cells < std::numeric_limits<int32_t>::max(), "shapes do not add up to the cells of value");
  STD_TORCH_CHECK(locations.size(3) == levels && locations.size(5) == 2 && locations.size(0) == value.size(0) && locations.size(2) == value.size(2), "locations do not fit value and shapes");
  for (int i = 0; i < 5; ++i) STD_TORCH_CHECK(weights.size(i) == locations.size(i), "weights do not fit locations");
  return {value.size(0), cells, value.size(2), value.size(3), locations.size(1), static_cast<int>(levels), static_cast<int>(locations.size(4))};
}

// f(blocks, stream) on the device of a tensor, if there is anything to do
template <class F>
void launch(const Tensor& t, const Sizes& s, F&& f) {
  const int64_t warps = s.batch * s.queries * s.heads;
  if (warps == 0 || s.channels == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no CUDA stream");
  f(static_cast<unsigned>((warps * kWarp + kThreads - 1) / kThreads), static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn: ", cudaGetErrorString(error));
}

}  // namespace

Tensor ms_deform_attn_cuda(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  Levels m;
  const Sizes s = check(value, shapes, locations, weights, m);
  Tensor out = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels});
  float_or_double(value, "value", [&](auto zero) {
    using T = decltype(zero);
    launch(value, s, [&](unsigned blocks, cudaStream_t stream) {
      forward<T><<<blocks, kThreads, 0, stream>>>(s, m, value.const_data_ptr<T>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), out.mutable_data_ptr<T>());
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cuda(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  Levels m;
  const Sizes s = check(value, shapes, locations, weights, m);
  check_dense(grad, "grad"), check_type(grad, value.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.numel() == s.batch * s.queries * s.heads * s.channels, "grad does not fit");
  Tensor d_value = torch::stable::new_zeros(value, {s.batch, s.cells, s.heads, s.channels});
  Tensor d_loc = torch::stable::new_zeros(locations, {s.batch, s.queries, s.heads, s.levels, s.points, 2});
  Tensor d_weight = torch::stable::new_zeros(weights, {s.batch, s.queries, s.heads, s.levels, s.points});
  float_or_double(value, "value", [&](auto zero) {
    using T = decltype(zero);
    launch(value, s, [&](unsigned blocks, cudaStream_t stream) {
      backward<T><<<blocks, kThreads, 0, stream>>>(s, m, grad.const_data_ptr<T>(), value.const_data_ptr<T>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), d_value.mutable_data_ptr<T>(), d_loc.mutable_data_ptr<T>(), d_weight.mutable_data_ptr<T>());
    });
  });
  return {d_value, d_loc, d_weight};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&visdet::ms_deform_attn_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&visdet::ms_deform_attn_backward_cuda));
}
