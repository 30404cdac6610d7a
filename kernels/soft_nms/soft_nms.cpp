// Soft suppression: the best box is taken, the scores of those it overlaps are lowered, and so on.
//
// Candidates of a class lie in blocks of sixteen neighbours. A block knows the rectangle around its boxes and its best
// score. A box that is taken therefore reads two short tables, one to find the blocks it may touch and one to find the next
// best, and recomputes a handful of blocks; all others are as they were. When half of the boxes are gone the rest move up.
#include "../groups.h"

#include <bit>

#include "../vecmath.h"

namespace visdet {

struct Rule {
  double thr, sigma, min_score;
};

template <class T>
struct Pool {
  std::vector<Block<T>> blocks;
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  std::vector<T> score;  // by candidate
  std::vector<int32_t> row;
  std::vector<T> x1, y1, x2, y2;  // by block
  std::vector<Bits> best;
  int64_t n = 0, alive = 0;
  static constexpr T kDead = -std::numeric_limits<T>::infinity();
  static constexpr Bits kNone = std::bit_cast<Bits>(kDead);

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
        key[i].first = key[i].first * side + static_cast<int64_t>(c > 0 ? std::min<double>(c, side - 1) : 0);
        key[i].second = rows[i];
      }
    }
    std::sort(key.begin(), key.end());
    for (int64_t i = 0; i < n; ++i) rows[i] = key[i].second;
  }

  Pool(const T* boxes, const std::vector<int32_t>& rows, const std::vector<T>& scores) { fill(boxes, rows, scores); }

  void fill(const T* boxes, const std::vector<int32_t>& rows, const std::vector<T>& scores) {
    alive = rows.size(), n = (alive + kBlock - 1) / kBlock;
    const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
    const T far = std::numeric_limits<T>::max();
    blocks.assign(n, Block<T>()), score.assign(n * kBlock, kDead), row.assign(n * kBlock, 0);
    best.assign(padded, kNone);
    x1.assign(padded, far), y1.assign(padded, far), x2.assign(padded, -far), y2.assign(padded, -far);
    for (int64_t i = 0; i < alive; ++i) {
      const T* b = boxes + 4 * rows[i];
      const int64_t s = i / kBlock;
      blocks[s].set(i % kBlock, b);
      score[i] = scores[i] + T(0), row[i] = rows[i];
      x1[s] = std::min(x1[s], b[0]), y1[s] = std::min(y1[s], b[1]);
      x2[s] = std::max(x2[s], b[2]), y2[s] = std::max(y2[s], b[3]);
    }
    for (int64_t s = 0; s < n; ++s) refresh(s);
  }

  // Leave out the dead; neighbours stay neighbours.
  void compact(const T* boxes) {
    std::vector<int32_t> rows;
    std::vector<T> scores;
    for (size_t i = 0; i < score.size(); ++i)
      if (score[i] != kDead) rows.push_back(row[i]), scores.push_back(score[i]);
    fill(boxes, rows, scores);
  }

  // The best of a block; a block without any is out of reach. Scores are not negative, so their bits sort as they do.
  void refresh(int64_t s) {
    const T* sc = &score[s * kBlock];
    Bits m = kNone;
    LANES for (int64_t k = 0; k < kBlock; ++k) m = std::max(m, std::bit_cast<Bits>(sc[k]));
    best[s] = m;
    if (m == kNone) x1[s] = std::numeric_limits<T>::max(), x2[s] = -x1[s];
  }

  // The place of the best of all, ties to the lower row; -1 if none is left
  int64_t top() const {
    Bits all = kNone;
    for (Bits o : best) all = std::max(all, o);
    if (all == kNone) return -1;
    int64_t at = -1;
    for (size_t p = 0; p < best.size(); p += kBlock) {
      Bits any = 0;
      LANES for (int64_t k = 0; k < kBlock; ++k) any |= best[p + k] == all ? Bits(1) : Bits(0);
      for (size_t s = p; any && s < p + kBlock; ++s)
        for (size_t k = s * kBlock; best[s] == all && k < (s + 1) * kBlock; ++k)
          if (std::bit_cast<Bits>(score[k]) == all && (at < 0 || row[k] < row[at])) at = k;
    }
    return at;
  }

  template <bool gaussian>
  void lower(int64_t s, const T* b, T area, T sigma, T thr, T low) {
    T inter[kBlock], factor[kBlock], *sc = &score[s * kBlock];
    if (!blocks[s].meet(b, inter)) return;
    const T* other = blocks[s].area;
    LANES for (int64_t k = 0; k < kBlock; ++k) {
      T iou = inter[k] / (area + other[k] - inter[k]);
      iou = iou >= 0 ? iou : T(0);  // nothing shared, or too large to be measured
      if constexpr (gaussian) factor[k] = vec::exp_neg(iou * iou / sigma);
      else factor[k] = iou > thr ? 1 - iou : T(1);
    }
    int32_t lost = 0;
    LANES for (int64_t k = 0; k < kBlock; ++k) {
      const T now = sc[k] * factor[k];  // NaN where the dead meet a factor of zero
      const T left = now >= low ? now : kDead;
      const int32_t dead = left == kDead, before = sc[k] == kDead;
      lost += dead - before;
      sc[k] = left;
    }
    alive -= lost;
    refresh(s);
  }

  template <bool gaussian, class F>
  void run(const T* boxes, const Rule& rule, int64_t most, F&& take) {
    const T thr = not_above<T>(rule.thr), sigma = static_cast<T>(rule.sigma), low = static_cast<T>(rule.min_score);
    int32_t hit[kBlock];
    for (int64_t at; most != 0 && (at = top()) >= 0; --most) {
      const T* b = boxes + 4 * row[at];
      take(row[at], score[at]);
      score[at] = kDead, --alive, refresh(at / kBlock);
      const T area = (b[2] - b[0]) * (b[3] - b[1]);
      for (int64_t p = 0; p < n; p += kBlock) {
        int32_t any = 0;
        LANES for (int64_t k = 0; k < kBlock; ++k) {
          hit[k] = (x1[p + k] < b[2]) & (x2[p + k] > b[0]) & (y1[p + k] < b[3]) & (y2[p + k] > b[1]);
          any |= hit[k];
        }
        for (int64_t k = 0; any && k < kBlock; ++k)
          if (hit[k]) lower<gaussian>(p + k, b, area, sigma, thr, low);
      }
      if (n > 4 && 2 * alive < n * kBlock) compact(boxes);
    }
  }
};

// boxes (N,4), scores (N,) of one type, labels (N,) i64 -> rows by falling new score, ties by lower row, and these scores
std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
                                    bool gaussian, double thr, double sigma, double min_score, int64_t most) {
  check_rows(boxes, scores, labels), check_type(scores, boxes.scalar_type(), "scores");
  const Rule rule{thr, sigma, min_score};
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
        std::vector<T> scores;
        for (int32_t row : rows) scores.push_back(s[row]);
        Pool<T> pool(b, rows, scores);
        auto take = [&](int32_t row, T score) { now[row] = score; };
        if (gaussian) pool.template run<true>(b, rule, most, take);
        else pool.template run<false>(b, rule, most, take);
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
