// Soft suppression: the best box is taken, the scores of those it overlaps are lowered, and so on.
//
// Candidates of a class lie in blocks of sixteen neighbours. A block knows the rectangle around its boxes and its best
// score. A box that is taken therefore reads two short tables, one to find the blocks it may touch and one to find the next
// best, and recomputes a handful of blocks; all others are as they were.
#include "../groups.h"

namespace visdet {

struct Rule {
  bool gaussian;
  double thr, sigma, min_score;
};

template <class T>
struct Pool {
  std::vector<Block<T>> blocks;
  std::vector<T> score, best, x1, y1, x2, y2; // by candidate; by block
  std::vector<int32_t> row, best_row;
  int64_t n = 0;
  static constexpr T kDead = -std::numeric_limits<T>::infinity();

  // Rows of a class, neighbours together: cells of a grid, walked row by row
  static void by_place(const T* boxes, std::vector<int32_t>& rows) {
    const int64_t n = rows.size(), side = std::ceil(std::sqrt(n / double(kBlock)));
    if (n <= 4 * kBlock) return;
    std::vector<std::pair<int64_t, int32_t>> key(n);
    for (int d = 0; d < 2; ++d) {
      auto centre = [&](int32_t r) { return boxes[4 * r + d] / 2. + boxes[4 * r + d + 2] / 2.; };
      double lo = std::numeric_limits<double>::infinity(), hi = -lo;
      for (int32_t r : rows) lo = std::min(lo, centre(r)), hi = std::max(hi, centre(r));
      const double per = hi > lo ? side / (hi - lo) : 0;
      for (int64_t i = 0; i < n; ++i) {
        const double c = (centre(rows[i]) - lo) * per;
        key[i].first = key[i].first * side + (c > 0 ? std::min<int64_t>(std::min<double>(c, side - 1), side - 1) : 0);
        key[i].second = rows[i];
      }
    }
    std::sort(key.begin(), key.end());
    for (int64_t i = 0; i < n; ++i) rows[i] = key[i].second;
  }

  Pool(const T* boxes, const T* scores, const std::vector<int32_t>& rows) {
    n = (rows.size() + kBlock - 1) / kBlock;
    const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
    const T far = std::numeric_limits<T>::max();
    blocks.resize(n), score.assign(n * kBlock, kDead), row.assign(n * kBlock, 0);
    best.assign(padded, kDead), best_row.assign(padded, 0);
    x1.assign(padded, far), y1.assign(padded, far), x2.assign(padded, -far), y2.assign(padded, -far);
    for (size_t i = 0; i < rows.size(); ++i) {
      const T* b = boxes + 4 * rows[i];
      const int64_t s = i / kBlock;
      blocks[s].set(i % kBlock, b);
      score[i] = scores[rows[i]], row[i] = rows[i];
      x1[s] = std::min(x1[s], b[0]), y1[s] = std::min(y1[s], b[1]);
      x2[s] = std::max(x2[s], b[2]), y2[s] = std::max(y2[s], b[3]);
    }
    for (int64_t s = 0; s < n; ++s) refresh(s);
  }

  // The best of a block, ties to the lower row
  void refresh(int64_t s) {
    T m = kDead;
    int32_t r = 0;
    for (int64_t k = s * kBlock; k < (s + 1) * kBlock; ++k)
      if (score[k] > m || (score[k] == m && row[k] < r)) m = score[k], r = row[k];
    best[s] = m, best_row[s] = r;
  }

  // The block that holds the best of all, ties to the lower row
  int64_t top() const {
    T m[kBlock], all = kDead;
    std::fill(m, m + kBlock, kDead);
    for (size_t s = 0; s < best.size(); s += kBlock)
      for (int64_t k = 0; k < kBlock; ++k) m[k] = best[s + k] > m[k] ? best[s + k] : m[k];
    for (T o : m) all = std::max(all, o);
    if (all == kDead) return -1;
    int64_t at = -1;
    for (int64_t s = 0; s < n; ++s)
      if (best[s] == all && (at < 0 || best_row[s] < best_row[at])) at = s;
    return at;
  }

  void lower(int64_t s, const T* b, T area, const Rule& rule, T thr) {
    T inter[kBlock], *sc = &score[s * kBlock];
    if (!blocks[s].meet(b, inter)) return;
    const T sigma = static_cast<T>(rule.sigma), low = static_cast<T>(rule.min_score);
    for (int64_t k = 0; k < kBlock; ++k) {
      if (!(inter[k] > 0) || sc[k] == kDead) continue;
      const T iou = inter[k] / (area + blocks[s].area[k] - inter[k]);
      if (rule.gaussian) sc[k] *= std::exp(-(iou * iou) / sigma);
      else if (iou > thr) sc[k] *= 1 - iou;
      if (sc[k] < low) sc[k] = kDead;
    }
    refresh(s);
  }

  template <class F>
  void run(const T* boxes, const Rule& rule, int64_t most, F&& take) {
    const T thr = not_above<T>(rule.thr);
    int32_t hit[kBlock];
    for (int64_t s; most != 0 && (s = top()) >= 0; --most) {
      const T* b = boxes + 4 * best_row[s];
      take(best_row[s], best[s]);
      for (int64_t k = s * kBlock; k < (s + 1) * kBlock; ++k)
        if (row[k] == best_row[s]) score[k] = kDead;
      refresh(s);
      const T area = (b[2] - b[0]) * (b[3] - b[1]);
      for (int64_t p = 0; p < n; p += kBlock) {
        int32_t any = 0;
        for (int64_t k = 0; k < kBlock; ++k) {
          hit[k] = (x1[p + k] < b[2]) & (x2[p + k] > b[0]) & (y1[p + k] < b[3]) & (y2[p + k] > b[1]);
          any |= hit[k];
        }
        for (int64_t k = 0; any && k < kBlock; ++k)
          if (hit[k]) lower(p + k, b, area, rule, thr);
      }
    }
  }
};

// boxes (N,4), scores (N,) of one type, labels (N,) i64 -> rows by falling new score, ties by lower row, and these scores
std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
                                    bool gaussian, double thr, double sigma, double min_score, int64_t most) {
  check_rows(boxes, scores, labels), check_type(scores, boxes.scalar_type(), "scores");
  const Rule rule{gaussian, thr, sigma, min_score};
  std::vector<int32_t> kept;
  Tensor out = torch::stable::empty({0}, boxes.scalar_type());
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *b = boxes.const_data_ptr<T>(), *s = scores.const_data_ptr<T>();
    const Groups g = by_class(labels ? labels->const_data_ptr<int64_t>() : nullptr, by_score(s, boxes.size(0)));
    std::vector<T> now(boxes.size(0), Pool<T>::kDead);
    over_groups(g, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        std::vector<int32_t> rows;
        for (int64_t k = g.start[i]; k < g.start[i + 1] && s[g.rows[k]] >= static_cast<T>(min_score); ++k) rows.push_back(g.rows[k]);
        Pool<T>::by_place(b, rows);
        Pool<T>(b, s, rows).run(b, rule, most, [&](int32_t row, T score) { now[row] = score; });
      }
    });
    for (int32_t row : by_score(now.data(), now.size())) {
      if (now[row] == Pool<T>::kDead || static_cast<int64_t>(kept.size()) == most) break;
      kept.push_back(row);
    }
    out = torch::stable::empty({static_cast<int64_t>(kept.size())}, boxes.scalar_type());
    for (size_t i = 0; i < kept.size(); ++i) out.mutable_data_ptr<T>()[i] = now[kept[i]];
  });
  return {chosen(kept, -1, [](int32_t) { return true; }), out};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("soft_nms(Tensor boxes, Tensor scores, Tensor? labels, bool gaussian, float thr, float sigma, float min_score, int most) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("soft_nms", TORCH_BOX(&visdet::soft_nms));
}
