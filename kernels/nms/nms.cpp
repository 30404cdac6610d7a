// Greedy suppression, within classes or among all boxes.
//
// A box is compared with the boxes already kept of its class only, sixteen at a time, and stops at the first block that
// covers it. Classes are independent and run in parallel; no coordinates are shifted, so none can overflow.
//
// A class of thousands has a grid besides: kept boxes lie in the cell of their centre. Two boxes whose IoU exceeds t share
// more than t of either's width, so their centres are less than max(1 - t, (1/t - 1)/2) widths of one of them apart, and
// the same holds for heights. Only the cells within that reach are looked at.
#include "../groups.h"

namespace visdet {

template <class T>
struct Kept {
  std::vector<Block<T>> blocks;
  int64_t n = 0;

  void push(const T* b) {
    const size_t at = n / kBlock;
    if (n % kBlock == 0) {
      if (at == blocks.size()) blocks.emplace_back();
      else blocks[at] = Block<T>();
    }
    blocks[at].set(n++ % kBlock, b);
  }

  bool covers(const T* b, T a, T thr) const {
    T inter[kBlock];
    for (int64_t s = 0; s * kBlock < n; ++s) {
      if (!blocks[s].meet(b, inter)) continue;
      int32_t any = 0;
      LANES for (int64_t k = 0; k < kBlock; ++k) {
        const int32_t over = inter[k] / (blocks[s].area[k] + a - inter[k]) > thr;
        any |= over;
      }
      if (any) return true;
    }
    return false;
  }
};

template <class T>
struct Grid {
  std::vector<Kept<T>> cells;
  int64_t side;
  double low[2], per[2], reach;

  Grid(const T* boxes, const int32_t* rows, int64_t n, double thr) {
    side = std::clamp<int64_t>(std::sqrt(n / 64.), 1, 64);
    reach = 1.001 * std::max(1 - thr, (1 / thr - 1) / 2);
    for (int d = 0; d < 2; ++d) {
      double lo = std::numeric_limits<double>::infinity(), hi = -lo;
      for (int64_t i = 0; i < n; ++i) {
        const double c = centre(boxes + 4 * rows[i], d);
        lo = std::min(lo, c), hi = std::max(hi, c);
      }
      low[d] = lo, per[d] = hi > lo ? side / (hi - lo) : 0;
    }
    cells.resize(side * side);
  }

  static double centre(const T* b, int d) { return b[d] / 2. + b[d + 2] / 2.; }

  // NaN comes from infinity times zero, where there is one cell only.
  int64_t cell(double at, int d) const {
    const double c = (at - low[d]) * per[d];
    return c > 0 ? std::min<double>(c, side - 1) : 0;
  }

  bool covers(const T* b, T a, T thr) const {
    int64_t from[2], to[2];
    for (int d = 0; d < 2; ++d) {
      const double c = centre(b, d), r = reach * (static_cast<double>(b[d + 2]) - b[d]);
      from[d] = cell(c - r, d), to[d] = cell(c + r, d);
    }
    for (int64_t y = from[1]; y <= to[1]; ++y)
      for (int64_t x = from[0]; x <= to[0]; ++x)
        if (cells[y * side + x].covers(b, a, thr)) return true;
    return false;
  }

  void push(const T* b) { cells[cell(centre(b, 1), 1) * side + cell(centre(b, 0), 0)].push(b); }
};

// Boxes without a side overlap nothing: they stay, and suppress nothing.
template <class T, class K>
void one_class(const T* boxes, const int32_t* rows, int64_t n, T thr, K& kept, uint8_t* keep) {
  for (int64_t i = 0; i < n; ++i) {
    const T* b = boxes + 4 * rows[i];
    const bool solid = b[2] > b[0] && b[3] > b[1];
    if (solid && kept.covers(b, (b[2] - b[0]) * (b[3] - b[1]), thr)) continue;
    keep[rows[i]] = 1;
    if (solid) kept.push(b);
  }
}

template <class T>
void suppress(const T* boxes, const Groups& g, double thr, uint8_t* keep) {
  constexpr int64_t kMany = 4096;
  const T t = not_above<T>(thr);
  over_groups(g, [&](int64_t from, int64_t to) {
    Kept<T> kept;
    for (int64_t i = from; i < to; ++i) {
      const int32_t* rows = &g.rows[g.start[i]];
      const int64_t n = g.start[i + 1] - g.start[i];
      if (n >= kMany && thr >= 0.1) {
        Grid<T> grid(boxes, rows, n, thr);
        one_class(boxes, rows, n, t, grid, keep);
      } else {
        kept.n = 0;
        one_class(boxes, rows, n, t, kept, keep);
      }
    }
  });
}

// boxes (N,4) and scores (N,) of f32|f64, labels (N,) i64 -> rows kept by falling score, at most `most` if that is >= 0
Tensor nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double thr, int64_t most) {
  check_rows(boxes, scores, labels);
  const std::vector<int32_t> order = by_score(scores);
  const Groups g = by_class(labels ? labels->const_data_ptr<int64_t>() : nullptr, order);
  std::vector<uint8_t> keep(order.size(), 0);
  float_or_double(boxes, "boxes", [&](auto z) { suppress(boxes.const_data_ptr<decltype(z)>(), g, thr, keep.data()); });
  return chosen(order, most, [&](int32_t row) { return keep[row]; });
}

// boxes (N,4) by class and, within each, by falling score; labels (N,) i64 -> which are kept (N,) bool
Tensor nms_sorted(const Tensor& boxes, const Tensor& labels, double thr) {
  check_dense(boxes, "boxes"), check_dense(labels, "labels"), check_type(labels, ScalarType::Long, "labels");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && labels.dim() == 1 && labels.size(0) == n, "boxes must be (N,4), labels (N,)");
  Groups g{std::vector<int32_t>(n), {0}};
  std::iota(g.rows.begin(), g.rows.end(), 0);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 1; i < n; ++i)
    if (label[i] != label[i - 1]) g.start.push_back(i);
  if (n) g.start.push_back(n);
  Tensor keep = torch::stable::empty({n}, ScalarType::Bool);
  uint8_t* out = static_cast<uint8_t*>(keep.mutable_data_ptr());
  std::fill(out, out + n, 0);
  float_or_double(boxes, "boxes", [&](auto z) { suppress(boxes.const_data_ptr<decltype(z)>(), g, thr, out); });
  return keep;
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("nms(Tensor boxes, Tensor scores, Tensor? labels, float thr, int most) -> Tensor");
  m.def("nms_sorted(Tensor boxes, Tensor labels, float thr) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("nms", TORCH_BOX(&visdet::nms));
  m.impl("nms_sorted", TORCH_BOX(&visdet::nms_sorted));
}
