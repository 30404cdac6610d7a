// RoI Align from several feature maps at once, channels last, and its gradient.
//
// Interpolation is separable, and neighbouring points of a bin read the same cells. So for each region the cells that a bin
// touches are collected along y and along x with their weights added up, and a bin is the sum of (cells along y) times
// (cells along x) rows of channels: nine for a bin two cells wide, where the definition reads sixteen. Sums of 64 channels
// stay in registers.
//
// The gradient adds rows to cells that regions share. Work is cut by map, image and block of channels: nobody else writes
// to the numbers of such a piece, and its regions come in their own order, so the sum never depends on threads.
#include "../common.h"

#include <array>

#if defined(__GNUC__) && !defined(__clang__)
#define VISDET_EXACT __attribute__((optimize("fp-contract=off")))
#else
#define VISDET_EXACT
#endif

namespace visdet {

template <class T>
struct Map {  // one level
  int64_t images, height, width, channels;
  T scale;
};

// Along one axis, for each bin the cells it touches and their weights.
template <class T>
struct Axis {
  std::vector<int64_t> cell, start;
  std::vector<T> weight;

  void add(int64_t c, T w) {
    if (w == 0) return;
    for (int64_t i = cell.size(); i-- > start.back() && i + 2 >= int64_t(cell.size());)
      if (cell[i] == c) {
        weight[i] += w;
        return;
      }
    cell.push_back(c), weight.push_back(w);
  }

  // The order of operations is that of the reference: a point exactly one cell outside still counts.
  VISDET_EXACT void fill(T lo, T length, int64_t bins, int64_t points, int64_t n, T share) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    const T step = length / T(bins);
    cell.clear(), weight.clear(), start.assign(1, 0);
    for (int64_t k = 0; k < bins; ++k) {
      const T edge = lo + T(k) * step;
      for (int64_t i = 0; i < points; ++i) {
        T c = edge + (T(i) + T(.5)) * step / T(points);
        if (!(c >= -1 && c <= n)) continue;
        c = std::min(std::max(c, T(0)), T(n - 1));
        const int64_t low = c;
        const T f = c - T(low);
        add(low, (1 - f) * share), add(std::min(low + 1, n - 1), f * share);
      }
      start.push_back(cell.size());
    }
  }
};

// A region on its map: the axes, or the news that it is broken.
template <class T>
struct Region {
  Axis<T> y, x;
  bool broken = false;

  VISDET_EXACT void place(const T* roi, const Map<T>& m, int64_t bh, int64_t bw, int64_t points, bool aligned) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    const T half = aligned ? T(.5) : T(0);
    const T x1 = roi[1] * m.scale - half, y1 = roi[2] * m.scale - half, x2 = roi[3] * m.scale - half, y2 = roi[4] * m.scale - half;
    T w = x2 - x1, h = y2 - y1;
    broken = !std::isfinite(w) || !std::isfinite(h);
    if (broken) return;
    if (!aligned) w = std::max(w, T(1)), h = std::max(h, T(1));
    int64_t sh = points, sw = points;
    if (!points) {
      const T ch = std::ceil(h / T(bh)), cw = std::ceil(w / T(bw));
      const bool none = ch <= 0 || cw <= 0;
      sh = none ? 0 : int64_t(ch), sw = none ? 0 : int64_t(cw);
    }
    y.fill(y1, h, bh, sh, m.height, sh ? 1 / T(sh * sw) : T(0));
    x.fill(x1, w, bw, sw, m.width, T(1));
  }
};

// Rows that a row of bins reads: their places in the image's map and their weights, bin after bin.
constexpr int64_t kAhead = 8;

template <class T>
struct Taps {
  std::vector<int64_t> at, start;
  std::vector<T> weight;

  // At the end there are places that are fetched ahead and never read.
  void line(const Region<T>& r, int64_t p, int64_t bins, const Map<T>& m) {
    at.clear(), weight.clear(), start.assign(1, 0);
    for (int64_t q = 0; q < bins; ++q) {
      for (int64_t i = r.y.start[p]; i < r.y.start[p + 1]; ++i)
        for (int64_t j = r.x.start[q]; j < r.x.start[q + 1]; ++j) {
          at.push_back((r.y.cell[i] * m.width + r.x.cell[j]) * m.channels);
          weight.push_back(r.y.weight[i] * r.x.weight[j]);
        }
      start.push_back(at.size());
    }
    at.insert(at.end(), kAhead, at.empty() ? 0 : at.back());
  }

  void collect(const Region<T>& r, int64_t p, int64_t q, const Map<T>& m) {
    at.clear(), weight.clear();
    for (int64_t i = r.y.start[p]; i < r.y.start[p + 1]; ++i)
      for (int64_t j = r.x.start[q]; j < r.x.start[q + 1]; ++j) {
        at.push_back((r.y.cell[i] * m.width + r.x.cell[j]) * m.channels);
        weight.push_back(r.y.weight[i] * r.x.weight[j]);
      }
  }
};

// Maps do not fit into the caches, and rows lie anywhere in them: those of the next bins are on their way while this is added.
template <int64_t N, class T>
void gather(const T* rows, const Taps<T>& taps, int64_t bin, T* out) {
  T acc[N] = {};
  for (int64_t t = taps.start[bin]; t < taps.start[bin + 1]; ++t) {
    const T *p = rows + taps.at[t], *next = rows + taps.at[t + kAhead], w = taps.weight[t];
    for (int64_t k = 0; k < N; k += 64 / sizeof(T)) __builtin_prefetch(next + k);
    for (int64_t k = 0; k < N; ++k) acc[k] += w * p[k];
  }
  std::copy_n(acc, N, out);
}

template <int64_t N, class T>
void scatter(const T* grad, const Taps<T>& taps, T* rows) {
  T g[N];
  std::copy_n(grad, N, g);
  for (size_t t = 0; t < taps.at.size(); ++t) {
    T *__restrict p = rows + taps.at[t], w = taps.weight[t];
    for (int64_t k = 0; k < N; ++k) p[k] += w * g[k];
  }
}

#ifdef __AVX512F__
constexpr int64_t kWide = 256;  // channels whose sums fit into registers
#else
constexpr int64_t kWide = 64;
#endif

// f.operator()<N>(channel) over channels from..to in pieces of Wide, 64, 16 and 1.
template <int64_t Wide = 64, class F>
void pieces(int64_t from, int64_t to, F&& f) {
  for (; from + Wide <= to; from += Wide) f.template operator()<Wide>(from);
  for (; from + 64 <= to; from += 64) f.template operator()<64>(from);
  for (; from + 16 <= to; from += 16) f.template operator()<16>(from);
  for (; from < to; ++from) f.template operator()<1>(from);
}

struct Call {
  int64_t bh, bw, points;
  bool aligned;
};

template <class T>
void check_regions(const T* rois, const int64_t* level, int64_t n, const std::vector<Map<T>>& maps, int64_t points) {
  for (int64_t r = 0; r < n; ++r) {
    STD_TORCH_CHECK(level[r] >= 0 && level[r] < int64_t(maps.size()), "level of a region outside the valid range");
    const T* p = rois + 5 * r;
    STD_TORCH_CHECK(p[0] >= 0 && p[0] < maps[level[r]].images, "batch idx of a region outside the valid range");
    if (!points)  // the number of points grows with the region
      STD_TORCH_CHECK(!(std::abs(p[3] - p[1]) > 1e8 || std::abs(p[4] - p[2]) > 1e8), "size of a region outside the valid range");
  }
}

inline void check_call(const Tensor& level, const Tensor& rois, const std::vector<double>& scales, size_t maps, const std::vector<int64_t>& bins, int64_t points) {
  check_dense(level, "level"), check_dense(rois, "rois"), check_type(level, ScalarType::Long, "level");
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5 && level.dim() == 1 && level.size(0) == rois.size(0), "rois must be (R,5), level (R,)");
  STD_TORCH_CHECK(maps > 0 && scales.size() == maps, "as many scales as maps");
  STD_TORCH_CHECK(bins.size() == 2 && bins[0] > 0 && bins[1] > 0 && points >= 0, "bins must be two positive numbers");
}

// feats: (B,H,W,C) each, level (R,) i64, rois (R,5) of the type of feats -> (R,h,w,C)
Tensor roi_align(std::vector<Tensor> feats, const Tensor& level, const Tensor& rois, std::vector<double> scales, std::vector<int64_t> bins,
                 int64_t points, bool aligned) {
  check_call(level, rois, scales, feats.size(), bins, points);
  const int64_t n = rois.size(0), bh = bins[0], bw = bins[1], channels = feats[0].size(3);
  Tensor out = torch::stable::empty({n, bh, bw, channels}, rois.scalar_type());
  float_or_double(rois, "rois", [&](auto zero) {
    using T = decltype(zero);
    std::vector<Map<T>> maps;
    std::vector<const T*> data;
    for (size_t i = 0; i < feats.size(); ++i) {
      const Tensor& f = feats[i];
      check_dense(f, "feats"), check_type(f, rois.scalar_type(), "feats");
      STD_TORCH_CHECK(f.dim() == 4 && f.size(3) == channels, "feats must be (B,H,W,C) with equal channels");
      maps.push_back({f.size(0), f.size(1), f.size(2), channels, T(scales[i])}), data.push_back(f.const_data_ptr<T>());
    }
    const T* roi = rois.const_data_ptr<T>();
    const int64_t* lvl = level.const_data_ptr<int64_t>();
    T* o = out.mutable_data_ptr<T>();
    check_regions(roi, lvl, n, maps, points);
    torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
      Region<T> r;
      Taps<T> taps;
      for (int64_t i = from; i < to; ++i) {
        const Map<T>& m = maps[lvl[i]];
        T* dst = o + i * bh * bw * channels;
        r.place(roi + 5 * i, m, bh, bw, points, aligned);
        if (r.broken) std::fill_n(dst, bh * bw * channels, std::numeric_limits<T>::quiet_NaN());
        if (r.broken) continue;
        const T* src = data[lvl[i]] + int64_t(roi[5 * i]) * m.height * m.width * channels;
        for (int64_t p = 0; p < bh; ++p) {
          taps.line(r, p, bw, m);
          for (int64_t q = 0; q < bw; ++q, dst += channels)
            pieces<sizeof(T) == 4 ? kWide : 64>(0, channels, [&]<int64_t N>(int64_t c) { gather<N>(src + c, taps, q, dst + c); });
        }
      }
    });
  });
  return out;
}

// grad (R,h,w,C), sizes (B,H,W) of each map -> gradient of each map (B,H,W,C)
std::vector<Tensor> roi_align_backward(const Tensor& grad, const Tensor& level, const Tensor& rois, std::vector<int64_t> sizes,
                                       std::vector<double> scales, int64_t points, bool aligned) {
  check_dense(grad, "grad"), check_type(grad, rois.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && sizes.size() == 3 * scales.size(), "grad must be (R,h,w,C)");
  const int64_t n = grad.size(0), bh = grad.size(1), bw = grad.size(2), channels = grad.size(3), levels = scales.size();
  check_call(level, rois, scales, levels, {bh, bw}, points);
  std::vector<Tensor> res;
  float_or_double(rois, "rois", [&](auto zero) {
    using T = decltype(zero);
    std::vector<Map<T>> maps;
    std::vector<T*> data;
    std::vector<int64_t> first{0};  // number of a level's first image
    for (int64_t i = 0; i < levels; ++i) {
      const int64_t b = sizes[3 * i], h = sizes[3 * i + 1], w = sizes[3 * i + 2];
      res.push_back(torch::stable::empty({b, h, w, channels}, rois.scalar_type()));
      maps.push_back({b, h, w, channels, T(scales[i])}), data.push_back(res.back().template mutable_data_ptr<T>());
      first.push_back(first.back() + b);
      T* p = data.back();
      torch::stable::parallel_for(0, b * h * w * channels, 1 << 16, [&](int64_t from, int64_t to) { std::fill(p + from, p + to, T(0)); });
    }
    const T *roi = rois.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
    const int64_t* lvl = level.const_data_ptr<int64_t>();
    check_regions(roi, lvl, n, maps, points);
    std::vector<std::vector<int64_t>> of(first.back());  // regions of each image of each level
    for (int64_t i = 0; i < n; ++i) of[first[lvl[i]] + int64_t(roi[5 * i])].push_back(i);
    std::vector<Region<T>> regions(n);
    torch::stable::parallel_for(0, n, 16, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) regions[i].place(roi + 5 * i, maps[lvl[i]], bh, bw, points, aligned);
    });
    const int64_t threads = torch::stable::get_num_threads(), unit = channels >= 64 * threads ? 64 : 16;
    const int64_t block = std::max(unit, (channels + threads * unit - 1) / (threads * unit) * unit), blocks = (channels + block - 1) / block;
    const int64_t groups = first.back();
    torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t from, int64_t to) {
      Taps<T> taps;
      for (int64_t t = from; t < to; ++t) {
        const int64_t group = t % groups, c0 = t / groups * block, c1 = std::min(c0 + block, channels);
        for (int64_t i : of[group]) {
          if (regions[i].broken) continue;
          const Map<T>& m = maps[lvl[i]];
          const T* src = g + i * bh * bw * channels;
          T* dst = data[lvl[i]] + int64_t(roi[5 * i]) * m.height * m.width * channels;
          for (int64_t p = 0; p < bh; ++p)
            for (int64_t q = 0; q < bw; ++q, src += channels) {
              taps.collect(regions[i], p, q, m);
              pieces(c0, c1, [&]<int64_t N>(int64_t c) { scatter<N>(src + c, taps, dst + c); });
            }
        }
      }
    });
  });
  return res;
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("roi_align(Tensor[] feats, Tensor level, Tensor rois, float[] scales, int[] bins, int points, bool aligned) -> Tensor");
  m.def("roi_align_backward(Tensor grad, Tensor level, Tensor rois, int[] sizes, float[] scales, int points, bool aligned) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&visdet::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&visdet::roi_align_backward));
}
