// Suppression in which boxes are compared once, without an order of events: fast and matrix suppression; and the groups
// that greedy suppression forms.
//
// The references make one table of the overlaps of all boxes, or of the best few of each class. Here a box meets the better
// ones of its own class, sixteen at a time, and no table exists.
#include "../groups.h"

#include "../vecmath.h"

namespace visdet {
namespace {

constexpr double kTiny = 1e-9;  // floor of denominators, square pixels, as in the reference

// The better boxes of a class, in order
template <class T>
struct Betters {
  std::vector<Block<T>> blocks;
  int64_t n = 0;

  void clear() { blocks.clear(), n = 0; }
  void push(const T* b) {
    if (n % kBlock == 0) blocks.emplace_back();
    blocks.back().set(n++ % kBlock, b);
  }
  int64_t size() const { return static_cast<int64_t>(blocks.size()); }

  // IoU of a box with block s; false if all are zero
  bool overlaps(int64_t s, const T* b, T area, T* iou) const {
    if (!blocks[s].meet(b, iou)) return false;
    LANES for (int64_t k = 0; k < kBlock; ++k) iou[k] = iou[k] / std::max(blocks[s].area[k] + area - iou[k], T(kTiny));
    return true;
  }
};

template <class T>
T area(const T* b) {
  return std::max(b[2] - b[0], T(0)) * std::max(b[3] - b[1], T(0));
}

const int64_t* pointer(const std::optional<Tensor>& labels) { return labels ? labels->const_data_ptr<int64_t>() : nullptr; }

// As `nms`, but any better box of the class drops another, be it dropped or kept; only the `pre` best of a class take part.
Tensor fast_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double thr, int64_t pre, int64_t most) {
  check_rows(boxes, scores, labels);
  const std::vector<int32_t> order = by_score(scores);
  const Groups g = by_class(pointer(labels), order);
  std::vector<uint8_t> keep(order.size(), 0);
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *data = boxes.const_data_ptr<T>(), t = not_above<T>(thr);
    over_groups(g, [&](int64_t from, int64_t to) {
      Betters<T> better;
      T iou[kBlock];
      for (int64_t c = from; c < to; ++c) {
        better.clear();
        for (int64_t i = g.start[c]; i < std::min(g.start[c + 1], g.start[c] + pre); ++i) {
          const T* b = data + 4 * g.rows[i];
          const T a = area(b);
          bool alive = true;
          for (int64_t s = 0; alive && s < better.size(); ++s) {
            if (!better.overlaps(s, b, a, iou)) continue;
            int32_t over = 0;
            LANES for (int64_t k = 0; k < kBlock; ++k) {
              const int32_t o = !(iou[k] <= t);  // one that cannot be measured drops it too
              over |= o;
            }
            alive = !over;
          }
          keep[g.rows[i]] = alive;
          better.push(b);
        }
      }
    });
  });
  return chosen(order, most, [&](int32_t row) { return keep[row]; });
}

// What remains of a score is the least factor over all better boxes i, pardoned by c_i, the greatest overlap of i itself:
// exp(-sigma (o^2 - c_i^2)) or (1 - o) / (1 - c_i), and never more than 1. For the bell it is enough to find the greatest
// exponent: one exponential a box.
template <bool gaussian, class T>
void remains(const T* data, const int32_t* rows, int64_t n, T sigma, T* factor) {
  Betters<T> better;
  std::vector<T> own;  // c_i^2 or 1 - c_i, by block
  T iou[kBlock];
  for (int64_t j = 0; j < n; ++j) {
    const T* b = data + 4 * rows[j];
    const T a = area(b);
    T most = 0, worst = gaussian ? T(0) : T(1);
    for (int64_t s = 0; s < better.size(); ++s) {
      if (!better.overlaps(s, b, a, iou)) continue;
      const T* c = &own[s * kBlock];
      T lane_most[kBlock], lane_worst[kBlock];
      LANES for (int64_t k = 0; k < kBlock; ++k) {
        lane_most[k] = iou[k];
        if constexpr (gaussian) lane_worst[k] = iou[k] * iou[k] - c[k];
        else lane_worst[k] = c[k] > 0 ? (1 - iou[k]) / c[k] : T(1);
      }
      for (int64_t k = 0; k < kBlock; ++k) {
        most = std::max(most, lane_most[k]);
        worst = gaussian ? std::max(worst, lane_worst[k]) : std::min(worst, lane_worst[k]);
      }
    }
    factor[j] = gaussian ? vec::exp_neg(sigma * worst) : worst;
    if (j % kBlock == 0) own.resize(own.size() + kBlock, gaussian ? T(0) : T(1));
    own[j] = gaussian ? most * most : 1 - most;
    better.push(b);
  }
}

// boxes and scores of one type -> rows by falling new score, ties by lower row, and these scores; only the `pre` best of
// all (if it is not negative) take part
std::tuple<Tensor, Tensor> matrix_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, bool gaussian,
                                      double sigma, double min_score, int64_t pre, int64_t most) {
  check_rows(boxes, scores, labels), check_type(scores, boxes.scalar_type(), "scores");
  std::vector<int32_t> order = by_score(scores);
  std::vector<uint8_t> out(order.size(), 0);
  for (size_t i = pre < 0 ? order.size() : pre; i < order.size(); ++i) out[order[i]] = 1;  // not considered
  const Groups g = by_class(pointer(labels), order);
  Tensor kept = torch::stable::empty({0}, ScalarType::Long), news = torch::stable::empty({0}, boxes.scalar_type());
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *data = boxes.const_data_ptr<T>(), *sc = scores.const_data_ptr<T>();
    std::vector<T> now(order.size());
    over_groups(g, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const int32_t* rows = &g.rows[g.start[c]];
        int64_t n = g.start[c + 1] - g.start[c];
        while (n && out[rows[n - 1]]) --n;  // those not considered are the last of their class
        std::vector<T> factor(n);
        if (gaussian) remains<true>(data, rows, n, static_cast<T>(sigma), factor.data());
        else remains<false>(data, rows, n, static_cast<T>(sigma), factor.data());
        for (int64_t i = 0; i < n; ++i) {
          const T v = now[rows[i]] = sc[rows[i]] * factor[i];
          if (!(static_cast<double>(v) >= min_score)) out[rows[i]] = 1;
        }
      }
    });
    order = by_score(now.data(), now.size());
    kept = chosen(order, most, [&](int32_t row) { return !out[row]; });
    news = torch::stable::empty({kept.size(0)}, boxes.scalar_type());
    for (int64_t i = 0; i < kept.size(0); ++i) news.mutable_data_ptr<T>()[i] = now[kept.const_data_ptr<int64_t>()[i]];
  });
  return {kept, news};
}

// Rows (N,) of all groups, one after another, by falling score of the box kept, which comes first, and the groups' sizes
std::tuple<Tensor, Tensor> nms_match(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double thr) {
  check_rows(boxes, scores, labels);
  const std::vector<int32_t> order = by_score(scores);
  const Groups g = by_class(pointer(labels), order);
  const int64_t n = order.size();
  std::vector<int32_t> owner(n);
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *data = boxes.const_data_ptr<T>(), t = not_above<T>(thr);
    over_groups(g, [&](int64_t from, int64_t to) {
      Betters<T> kept;
      std::vector<int32_t> row;
      T inter[kBlock];
      for (int64_t c = from; c < to; ++c) {
        kept.clear(), row.clear();
        for (int64_t i = g.start[c]; i < g.start[c + 1]; ++i) {
          const T* b = data + 4 * g.rows[i];
          const T a = (b[2] - b[0]) * (b[3] - b[1]);
          int32_t mine = g.rows[i];
          for (int64_t s = 0; mine == g.rows[i] && s < kept.size(); ++s) {
            if (!kept.blocks[s].meet(b, inter)) continue;
            for (int64_t k = kBlock; k-- > 0;)  // the first of those that cover it
              if (inter[k] / (kept.blocks[s].area[k] + a - inter[k]) > t) mine = row[s * kBlock + k];
          }
          owner[g.rows[i]] = mine;
          if (mine == g.rows[i]) kept.push(b), row.push_back(mine);
        }
      }
    });
  });
  std::vector<int64_t> size(n, 0), at(n, 0);
  for (int32_t r : owner) ++size[r];
  std::vector<int64_t> sizes;
  int64_t start = 0;
  for (int32_t r : order)
    if (owner[r] == r) at[r] = start, start += size[r], sizes.push_back(size[r]);
  Tensor rows = torch::stable::empty({n}, ScalarType::Long), counts = torch::stable::empty({static_cast<int64_t>(sizes.size())}, ScalarType::Long);
  int64_t* to = rows.mutable_data_ptr<int64_t>();
  for (int32_t r : order) to[at[owner[r]]++] = r;
  std::copy(sizes.begin(), sizes.end(), counts.mutable_data_ptr<int64_t>());
  return {rows, counts};
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("fast_nms(Tensor boxes, Tensor scores, Tensor? labels, float thr, int pre, int most) -> Tensor");
  m.def("matrix_nms(Tensor boxes, Tensor scores, Tensor? labels, bool gaussian, float sigma, float min_score, int pre, int most) -> (Tensor, Tensor)");
  m.def("nms_match(Tensor boxes, Tensor scores, Tensor? labels, float thr) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("fast_nms", TORCH_BOX(&visdet::fast_nms));
  m.impl("matrix_nms", TORCH_BOX(&visdet::matrix_nms));
  m.impl("nms_match", TORCH_BOX(&visdet::nms_match));
}
