// The CUDA side of RoI Align, channels last: neighbouring threads read neighbouring channels of the same four cells.
// The gradient is added with atomic operations, hence in no fixed order: its last digits may differ between runs.
#include "../common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cuda_runtime.h>

namespace visdet {
namespace {

constexpr int kThreads = 256, kLevels = 8;

template <class T>
struct Levels {
  T* data[kLevels];
  int64_t height[kLevels], width[kLevels], images[kLevels];
  T scale[kLevels];
  int64_t count;
};

__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }

// A region on its map: where it starts, the size of a bin, points a side.
template <class T>
struct Place {
  T x, y, bin_w, bin_h;
  int64_t sw, sh;
  bool broken;

  __device__ Place(const T* roi, T scale, int64_t bh, int64_t bw, int64_t points, bool aligned) {
    const T half = aligned ? T(.5) : T(0);
    x = times(roi[1], scale) - half, y = times(roi[2], scale) - half;
    T w = (times(roi[3], scale) - half) - x, h = (times(roi[4], scale) - half) - y;
    broken = !isfinite(w) || !isfinite(h);
    if (!aligned) w = w < 1 ? T(1) : w, h = h < 1 ? T(1) : h;
    bin_w = w / T(bw), bin_h = h / T(bh);
    sw = points ? points : broken ? 0 : int64_t(ceil(bin_w)), sh = points ? points : broken ? 0 : int64_t(ceil(bin_h));
    if (sw <= 0 || sh <= 0) sw = sh = 0;
  }
};

// The two cells around point `i` of bin `k` along one axis, and the weight of the second; false outside the map.
template <class T>
__device__ inline bool point(T lo, T step, int64_t k, int64_t i, int64_t points, int64_t n, int64_t& low, int64_t& high, T& f) {
  T c = (lo + times(T(k), step)) + times(T(i) + T(.5), step) / T(points);
  if (!(c >= -1 && c <= n)) return false;
  c = c < 0 ? T(0) : c > T(n - 1) ? T(n - 1) : c;
  low = int64_t(c), high = low + 1 < n ? low + 1 : n - 1, f = c - T(low);
  return true;
}

// A thread is a channel of a bin; `use(cell's offset, weight)` for each of the four cells of each point.
template <class T, class F>
__device__ inline void cells(const Place<T>& p, int64_t by, int64_t bx, int64_t height, int64_t width, F&& use) {
  const T share = p.sh ? 1 / T(p.sh * p.sw) : T(0);
  for (int64_t i = 0; i < p.sh; ++i) {
    int64_t y0, y1, x0, x1;
    T fy, fx;
    if (!point(p.y, p.bin_h, by, i, p.sh, height, y0, y1, fy)) continue;
    for (int64_t j = 0; j < p.sw; ++j) {
      if (!point(p.x, p.bin_w, bx, j, p.sw, width, x0, x1, fx)) continue;
      use(y0 * width + x0, (1 - fy) * (1 - fx) * share), use(y0 * width + x1, (1 - fy) * fx * share);
      use(y1 * width + x0, fy * (1 - fx) * share), use(y1 * width + x1, fy * fx * share);
    }
  }
}

template <class T>
__device__ inline bool inside(const Levels<T>& f, int64_t l, T image) {
  return l >= 0 && l < f.count && image >= 0 && image < f.images[l];
}

template <class T>
__global__ void forward(Levels<T> f, const int64_t* level, const T* rois, int64_t total, int64_t bh, int64_t bw, int64_t channels,
                        int64_t points, bool aligned, T* out) {
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < total; t += int64_t(gridDim.x) * kThreads) {
    const int64_t c = t % channels, bx = t / channels % bw, by = t / channels / bw % bh, r = t / channels / bw / bh, l = level[r];
    const T* roi = rois + r * 5;
    if (!inside(f, l, roi[0])) {
      __trap();  // an image or a level that is not there: an error at the next synchronisation
    }
    const Place<T> p(roi, f.scale[l], bh, bw, points, aligned);
    const T* src = f.data[l] + int64_t(roi[0]) * f.height[l] * f.width[l] * channels + c;
    T sum = 0;
    if (p.broken) sum = std::numeric_limits<T>::quiet_NaN();
    else cells(p, by, bx, f.height[l], f.width[l], [&](int64_t cell, T w) { sum += w * src[cell * channels]; });
    out[t] = sum;
  }
}

template <class T>
__global__ void backward(Levels<T> f, const int64_t* level, const T* rois, int64_t total, int64_t bh, int64_t bw, int64_t channels,
                         int64_t points, bool aligned, const T* grad) {
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < total; t += int64_t(gridDim.x) * kThreads) {
    const int64_t c = t % channels, bx = t / channels % bw, by = t / channels / bw % bh, r = t / channels / bw / bh, l = level[r];
    const T *roi = rois + r * 5, g = grad[t];
    if (!inside(f, l, roi[0])) continue;
    const Place<T> p(roi, f.scale[l], bh, bw, points, aligned);
    if (p.broken) continue;
    T* dst = f.data[l] + int64_t(roi[0]) * f.height[l] * f.width[l] * channels + c;
    cells(p, by, bx, f.height[l], f.width[l], [&](int64_t cell, T w) { atomicAdd(dst + cell * channels, w * g); });
  }
}

cudaStream_t stream_of(const Tensor& t) {
  void* s = nullptr;
  aoti_torch_get_current_cuda_stream(t.get_device_index(), &s);
  return static_cast<cudaStream_t>(s);
}

inline unsigned blocks_for(int64_t total) { return unsigned(std::min<int64_t>((total + kThreads - 1) / kThreads, 65535)); }

void check_call(const Tensor& level, const Tensor& rois, size_t scales, size_t maps) {
  check_dense(level, "level"), check_dense(rois, "rois"), check_type(level, ScalarType::Long, "level");
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5 && level.dim() == 1 && level.size(0) == rois.size(0), "rois must be (R,5), level (R,)");
  STD_TORCH_CHECK(maps > 0 && maps <= kLevels && scales == maps, "as many scales as maps, eight at most");
}

Tensor roi_align_cuda(std::vector<Tensor> feats, const Tensor& level, const Tensor& rois, std::vector<double> scales, std::vector<int64_t> bins,
                      int64_t points, bool aligned) {
  check_call(level, rois, scales.size(), feats.size());
  STD_TORCH_CHECK(bins.size() == 2 && bins[0] > 0 && bins[1] > 0 && points >= 0, "bins must be two positive numbers");
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  const int64_t n = rois.size(0), channels = feats[0].size(3), total = n * bins[0] * bins[1] * channels;
  Tensor out = torch::stable::new_empty(rois, {n, bins[0], bins[1], channels});
  float_or_double(rois, "rois", [&](auto zero) {
    using T = decltype(zero);
    Levels<T> f{};
    f.count = feats.size();
    for (size_t i = 0; i < feats.size(); ++i) {
      check_dense(feats[i], "feats"), check_type(feats[i], rois.scalar_type(), "feats");
      STD_TORCH_CHECK(feats[i].dim() == 4 && feats[i].size(3) == channels, "feats must be (B,H,W,C) with equal channels");
      f.data[i] = const_cast<T*>(feats[i].template const_data_ptr<T>()), f.scale[i] = T(scales[i]);
      f.images[i] = feats[i].size(0), f.height[i] = feats[i].size(1), f.width[i] = feats[i].size(2);
    }
    if (total)
      forward<T><<<blocks_for(total), kThreads, 0, stream_of(rois)>>>(f, level.const_data_ptr<int64_t>(), rois.const_data_ptr<T>(), total, bins[0],
                                                                       bins[1], channels, points, aligned, out.mutable_data_ptr<T>());
  });
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "roi_align did not start on the GPU");
  return out;
}

std::vector<Tensor> roi_align_backward_cuda(const Tensor& grad, const Tensor& level, const Tensor& rois, std::vector<int64_t> sizes,
                                            std::vector<double> scales, int64_t points, bool aligned) {
  check_call(level, rois, scales.size(), sizes.size() / 3);
  check_dense(grad, "grad"), check_type(grad, rois.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && sizes.size() == 3 * scales.size(), "grad must be (R,h,w,C)");
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  const int64_t bh = grad.size(1), bw = grad.size(2), channels = grad.size(3), total = grad.size(0) * bh * bw * channels;
  std::vector<Tensor> res;
  float_or_double(rois, "rois", [&](auto zero) {
    using T = decltype(zero);
    Levels<T> f{};
    f.count = scales.size();
    for (size_t i = 0; i < scales.size(); ++i) {
      res.push_back(torch::stable::new_zeros(rois, {sizes[3 * i], sizes[3 * i + 1], sizes[3 * i + 2], channels}));
      f.data[i] = res.back().template mutable_data_ptr<T>(), f.scale[i] = T(scales[i]);
      f.images[i] = sizes[3 * i], f.height[i] = sizes[3 * i + 1], f.width[i] = sizes[3 * i + 2];
    }
    if (total)
      backward<T><<<blocks_for(total), kThreads, 0, stream_of(rois)>>>(f, level.const_data_ptr<int64_t>(), rois.const_data_ptr<T>(), total, bh, bw,
                                                                        channels, points, aligned, grad.const_data_ptr<T>());
  });
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "roi_align_backward did not start on the GPU");
  return res;
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_IMPL(visdet, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&visdet::roi_align_cuda));
  m.impl("roi_align_backward", TORCH_BOX(&visdet::roi_align_backward_cuda));
}
