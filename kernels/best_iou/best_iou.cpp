// For every box the object it overlaps most, and for every object the box that overlaps it most, without the table of
// all overlaps.
//
// Boxes go through in blocks of 64, column by column, and a block meets one object after the other: a few vector
// instructions each. Neighbouring anchors lie near one another, so one comparison of the object with the hull of the
// block often tells that all 64 overlaps are zero. Chunks of blocks run in parallel, each with maxima of its own for the
// objects; these are merged in the order of the chunks, so the result does not depend on the number of threads.
#include "overlap.h"

#include <optional>
#include <tuple>
#include <type_traits>

namespace visdet {

constexpr int64_t kLanes = 64, kChunk = 2048;

template <class T>
struct Object {
  T x1, y1, x2, y2, area;
  int64_t at;  // column in the caller's tensor
  bool sound;  // all finite
};

template <class T>
struct Lanes {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
  T left, top, right, bottom;  // hull
  bool sound;

  // Lanes past the end repeat the last box, which changes no maximum.
  void load(const T* b, int64_t n) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const T* p = b + 4 * std::min(k, n - 1);
      x1[k] = p[0], y1[k] = p[1], x2[k] = p[2], y2[k] = p[3];
    }
    left = x1[0], top = y1[0], right = x2[0], bottom = y2[0];
    T any = 0;
    for (int64_t k = 0; k < kLanes; ++k) {
      area[k] = std::max(x2[k] - x1[k], T(0)) * std::max(y2[k] - y1[k], T(0));
      left = std::min(left, x1[k]), top = std::min(top, y1[k]);
      right = std::max(right, x2[k]), bottom = std::max(bottom, y2[k]);
      any += area[k] * 0 + (x1[k] + y1[k] + x2[k] + y2[k]) * 0;
    }
    sound = any == 0;
  }

  bool apart(const Object<T>& g) const {
    return sound & g.sound & ((right <= g.x1) | (left >= g.x2) | (bottom <= g.y1) | (top >= g.y2));
  }

  T iou(const Object<T>& g, int64_t k) const {
    const T inter = side(y1[k], y2[k], g.y1, g.y2) * side(x1[k], x2[k], g.x1, g.x2);
    return inter / std::max((area[k] + g.area) - inter, T(kTiny));
  }

  // Overlaps with one object; is one of them above `most`? The best of each lane is kept up to date.
  bool meet(const Object<T> g, T most, T* __restrict best, Index* __restrict arg, T* __restrict out) const {
    int any = 0;
    const Index at = Index(g.at);
    for (int64_t k = 0; k < kLanes; ++k) {
      const T v = iou(g, k);
      const bool better = above(v, best[k]);
      best[k] = better ? v : best[k];
      arg[k] = better ? at : arg[k];
      out[k] = v;
      any |= !(v <= most);
    }
    return any;
  }

  bool equals(const Object<T> g, T want, T* __restrict out) const {
    int any = 0;
    for (int64_t k = 0; k < kLanes; ++k) any |= (out[k] = iou(g, k)) == want;
    return any;
  }
};

template <class T>
struct Top {
  T value = -1;
  int64_t at = -1;
  void take(T v, int64_t i) {
    if (above(v, value)) value = v, at = i;
  }
};

template <class T>
std::vector<std::vector<Object<T>>> objects(const T* gts, const bool* valid, int64_t images, int64_t m) {
  std::vector<std::vector<Object<T>>> res(images);
  for (int64_t i = 0; i < images * m; ++i) {
    const T *g = gts + 4 * i, a = area(g);
    if (valid[i]) res[i / m].push_back({g[0], g[1], g[2], g[3], a, i % m, (g[0] + g[1] + g[2] + g[3]) * 0 + a * 0 == 0});
  }
  return res;
}

// One task: the boxes of a chunk against the objects of the images that have these boxes.
template <class T>
struct Task {
  const T* boxes;
  int64_t from, to;  // rows of the chunk

  // best, arg: rows of this image; tops: one an object
  void match(const std::vector<Object<T>>& gs, Lanes<T>& s, int64_t start, T* best, int64_t* arg, Top<T>* tops) const {
    typename Lanes<T>::Index where[kLanes];
    T most[kLanes], v[kLanes];
    const int64_t n = std::min(kLanes, to - start);
    // An overlap is never negative: where all are zero the first object is the best.
    std::fill_n(most, kLanes, gs.empty() ? T(-1) : T(0));
    std::fill_n(where, kLanes, gs.empty() ? -1 : gs[0].at);
    for (size_t j = 0; j < gs.size(); ++j) {
      if (s.apart(gs[j])) tops[j].take(0, start);
      else if (s.meet(gs[j], tops[j].value, most, where, v))
        for (int64_t k = 0; k < n; ++k) tops[j].take(v[k], start + k);
    }
    std::copy_n(most, n, best + start), std::copy_n(where, n, arg + start);
  }

  void claim(const Object<T>& g, T want, int64_t* out) const {
    Lanes<T> s;
    T v[kLanes];
    for (int64_t start = from; start < to; start += kLanes) {
      const int64_t n = std::min(kLanes, to - start);
      s.load(boxes + 4 * start, n);
      if (s.apart(g) || !s.equals(g, want, v)) continue;
      for (int64_t k = 0; k < n; ++k)
        if (v[k] == want) out[start + k] = g.at;
    }
  }
};

template <class T>
void run(const T* boxes, const T* gts, const bool* valid, int64_t groups, int64_t images, int64_t n, int64_t m,
         const std::optional<double>& least, T* best, int64_t* arg, T* top, int64_t* top_arg, int64_t* claim) {
  const auto gs = objects(gts, valid, images, m);
  const int64_t chunks = (n + kChunk - 1) / kChunk, per = images / std::max<int64_t>(groups, 1);
  std::vector<Top<T>> tops(images * chunks * m), all(images * m);
  const auto task = [&](int64_t t) {
    const int64_t from = t % chunks * kChunk;
    return Task<T>{boxes + t / chunks * n * 4, from, std::min(from + kChunk, n)};
  };
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t first, int64_t last) {
    Lanes<T> s;
    for (int64_t t = first; t < last; ++t) {
      const Task<T> w = task(t);
      for (int64_t start = w.from; start < w.to; start += kLanes) {
        s.load(w.boxes + 4 * start, std::min(kLanes, w.to - start));
        for (int64_t i = t / chunks * per; i < (t / chunks + 1) * per; ++i)
          w.match(gs[i], s, start, best + i * n, arg + i * n, &tops[(i * chunks + t % chunks) * m]);
      }
    }
  });
  for (int64_t i = 0; i < images; ++i)
    for (size_t j = 0; j < gs[i].size(); ++j) {
      Top<T>& a = all[i * m + j];
      for (int64_t c = 0; c < chunks; ++c) a.take(tops[(i * chunks + c) * m + j].value, tops[(i * chunks + c) * m + j].at);
      top[i * m + gs[i][j].at] = a.value, top_arg[i * m + gs[i][j].at] = a.at;
    }
  if (!least) return;
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const Task<T> w = task(t);
      for (int64_t i = t / chunks * per; i < (t / chunks + 1) * per; ++i) {
        std::fill(claim + i * n + w.from, claim + i * n + w.to, -1);
        for (size_t j = 0; j < gs[i].size(); ++j) {
          const T want = all[i * m + j].value;
          if (want > 0 && want >= *least && tops[(i * chunks + t % chunks) * m + j].value == want)
            w.claim(gs[i][j], want, claim + i * n);
        }
      }
    }
  });
}

// boxes (1|B,N,4), gts (B,M,4) of one type f32|f64, valid (B,M) bool ->
// best (B,N), its object (B,N) i64, best of each object (B,M), its box (B,M) i64, claim (B,N) i64 (empty unless asked)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_iou(const Tensor& boxes, const Tensor& gts, const Tensor& valid,
                                                            std::optional<double> least) {
  check_dense(boxes, "boxes"), check_dense(gts, "gts"), check_dense(valid, "valid");
  check_type(valid, ScalarType::Bool, "valid"), check_type(gts, boxes.scalar_type(), "gts");
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be (1|B,N,4)");
  STD_TORCH_CHECK(gts.dim() == 3 && gts.size(2) == 4 && valid.dim() == 2, "gts must be (B,M,4), valid (B,M)");
  const int64_t groups = boxes.size(0), images = gts.size(0), n = boxes.size(1), m = gts.size(1);
  STD_TORCH_CHECK(groups == 1 || groups == images, "boxes must be of one image or of as many as gts");
  STD_TORCH_CHECK(valid.size(0) == images && valid.size(1) == m, "valid must match gts");
  const ScalarType type = boxes.scalar_type(), index = ScalarType::Long;
  Tensor best = torch::stable::empty({images, n}, type), arg = torch::stable::empty({images, n}, index);
  Tensor top = torch::stable::full({images, m}, -1, type), top_arg = torch::stable::full({images, m}, -1, index);
  Tensor claim = torch::stable::empty({images, least ? n : 0}, index);
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    run<T>(boxes.const_data_ptr<T>(), gts.const_data_ptr<T>(), valid.const_data_ptr<bool>(), images ? groups : 0, images, n, m,
           least, best.mutable_data_ptr<T>(), arg.mutable_data_ptr<int64_t>(), top.mutable_data_ptr<T>(),
           top_arg.mutable_data_ptr<int64_t>(), claim.mutable_data_ptr<int64_t>());
  });
  return {best, arg, top, top_arg, claim};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("best_iou(Tensor boxes, Tensor gts, Tensor valid, float? least) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("best_iou", TORCH_BOX(&visdet::best_iou));
}
