// Overlap of rotated boxes, and suppression by it.
//
// In the frame of box A, A is the rectangle |x| <= W, |y| <= H. A vertical line cuts the other box in an interval, and what
// of it lies in A is clamp(top) - clamp(bottom). So the common area is an integral of clamp(y, -H, H) along the four edges,
// each cut to |x| <= W; along one edge that is three straight pieces. No vertices are collected or sorted, no case needs a
// branch, and sixteen boxes are done at once.
//
// Rows are (cx, cy, w, h, cos, sin), w and h not negative.
#include "../groups.h"

namespace visdet {

constexpr int64_t kCols = 6;

template <class T>
inline T clamp(T x, T lo, T hi) {
  return std::min(std::max(x, lo), hi);
}

// -integral of clamp(y, -H, H) dx from (px,py) to (qx,qy), within |x| <= W
template <class T>
inline T edge(T px, T py, T qx, T qy, T W, T H) {
  const T ex = qx - px, ey = qy - py, den = std::abs(ex) < T(1e-9) ? T(1) : ex;
  const T X0 = clamp(px, -W, W), X1 = clamp(qx, -W, W);
  const T Y0 = py + clamp((X0 - px) / den, T(0), T(1)) * ey, Y1 = py + clamp((X1 - px) / den, T(0), T(1)) * ey;
  const T lo = std::min(Y0, Y1), hi = std::max(Y0, Y1), len = hi - lo, safe = len < T(1e-12) ? T(1) : len;
  const T above = std::min(std::max(hi - H, T(0)), len) / safe, below = std::min(std::max(-H - lo, T(0)), len) / safe;
  const T middle = (clamp(lo, -H, H) + clamp(hi, -H, H)) * T(0.5);
  return (X0 - X1) * ((above - below) * H + (T(1) - above - below) * middle);
}

// Common area of A = (ax, ay, aw, ah, ac, as) and B
template <class T>
inline T common(const T* a, T bx, T by, T bw, T bh, T bc, T bs) {
  const T dx = bx - a[0], dy = by - a[1], W = a[2] * T(0.5), H = a[3] * T(0.5), w = bw * T(0.5), h = bh * T(0.5);
  const T x = dx * a[4] + dy * a[5], y = dy * a[4] - dx * a[5];
  const T c = a[4] * bc + a[5] * bs, s = a[4] * bs - a[5] * bc;
  const T ux = c * w, uy = s * w, vx = -(s * h), vy = c * h;
  T area = edge(x + ux + vx, y + uy + vy, x - ux + vx, y - uy + vy, W, H);
  area = area + edge(x - ux + vx, y - uy + vy, x - ux - vx, y - uy - vy, W, H);
  area = area + edge(x - ux - vx, y - uy - vy, x + ux - vx, y + uy - vy, W, H);
  area = area + edge(x + ux - vx, y + uy - vy, x + ux + vx, y + uy + vy, W, H);
  // Rectangles are apart exactly if one of the four axes separates them.
  const T C = std::abs(c), S = std::abs(s), bxx = dx * bc + dy * bs, byy = dy * bc - dx * bs;
  const bool apart = (std::abs(x) >= W + C * w + S * h) | (std::abs(y) >= H + S * w + C * h) |
                     (std::abs(bxx) >= w + C * W + S * H) | (std::abs(byy) >= h + S * W + C * H);
  area = std::min(std::max(area, T(0)), std::min(a[2] * a[3], bw * bh));
  return apart ? T(0) : area;
}

// Sixteen rotated boxes, column by column
template <class T>
struct alignas(64) Rotated {
  T v[kCols][kBlock] = {};

  void set(int64_t k, const T* row) {
    for (int64_t d = 0; d < kCols; ++d) v[d][k] = row[d];
  }

  void overlaps(const T* a, bool iof, T* out) const {
    const T one = a[2] * a[3], floor = T(1e-9);
    LANES for (int64_t k = 0; k < kBlock; ++k) {
      const T inter = common(a, v[0][k], v[1][k], v[2][k], v[3][k], v[4][k], v[5][k]);
      const T union_ = one + v[2][k] * v[3][k] - inter;
      out[k] = inter / std::max(iof ? one : union_, floor);
    }
  }

  // Could any circle around a box meet that around `a`?
  bool near(const T* a) const {
    const T r = (a[2] + a[3]) * T(0.5005);
    int32_t any = 0;
    LANES for (int64_t k = 0; k < kBlock; ++k) {
      const T reach = r + (v[2][k] + v[3][k]) * T(0.5005);
      const int32_t hit = !(std::abs(v[0][k] - a[0]) > reach) & !(std::abs(v[1][k] - a[1]) > reach);  // NaN meets all
      any |= hit;
    }
    return any;
  }
};

// a (N,6), b (M,6) -> (N,M), or (N,) row by row
Tensor rotated_iou(const Tensor& a, const Tensor& b, bool aligned, bool iof) {
  check_dense(a, "a"), check_dense(b, "b"), check_type(b, a.scalar_type(), "b");
  STD_TORCH_CHECK(a.dim() == 2 && a.size(1) == kCols && b.dim() == 2 && b.size(1) == kCols, "boxes must be (N,6)");
  const int64_t n = a.size(0), m = b.size(0);
  STD_TORCH_CHECK(!aligned || n == m, "aligned boxes must match row by row");
  Tensor res = aligned ? torch::stable::empty({n}, a.scalar_type()) : torch::stable::empty({n, m}, a.scalar_type());
  float_or_double(a, "a", [&](auto zero) {
    using T = decltype(zero);
    const T *pa = a.const_data_ptr<T>(), *pb = b.const_data_ptr<T>();
    T* out = res.mutable_data_ptr<T>();
    if (aligned) {
      torch::stable::parallel_for(0, n, 2048, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const T *p = pa + kCols * i, *q = pb + kCols * i, one = p[2] * p[3];
          const T inter = common(p, q[0], q[1], q[2], q[3], q[4], q[5]);
          out[i] = inter / std::max(iof ? one : one + q[2] * q[3] - inter, T(1e-9));
        }
      });
      return;
    }
    std::vector<Rotated<T>> blocks((m + kBlock - 1) / kBlock);
    for (int64_t j = 0; j < m; ++j) blocks[j / kBlock].set(j % kBlock, pb + kCols * j);
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, 8192 / std::max<int64_t>(m, 1)), [&](int64_t from, int64_t to) {
      T row[kBlock];
      for (int64_t i = from; i < to; ++i)
        for (int64_t j = 0; j < m; j += kBlock) {
          const Rotated<T>& o = blocks[j / kBlock];
          if (o.near(pa + kCols * i)) o.overlaps(pa + kCols * i, iof, row);
          else std::fill(row, row + kBlock, T(0));
          std::copy(row, row + std::min(kBlock, m - j), out + i * m + j);
        }
    });
  });
  return res;
}

// boxes (N,6), scores (N,), labels (N,) i64 -> rows kept by falling score, at most `most` if that is >= 0
Tensor rotated_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double thr, int64_t most) {
  check_rows(boxes, scores, labels, kCols);
  const std::vector<int32_t> order = by_score(scores);
  const Groups g = by_class(labels ? labels->const_data_ptr<int64_t>() : nullptr, order);
  std::vector<uint8_t> keep(order.size(), 0);
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T *b = boxes.const_data_ptr<T>(), t = not_above<T>(thr);
    over_groups(g, [&](int64_t from, int64_t to) {
      std::vector<Rotated<T>> kept;
      T iou[kBlock];
      for (int64_t i = from; i < to; ++i) {
        kept.clear();
        int64_t n = 0;
        for (int64_t k = g.start[i]; k < g.start[i + 1]; ++k) {
          const T* a = b + kCols * g.rows[k];
          int32_t any = 0;
          for (size_t s = 0; s < kept.size() && !any; ++s) {
            if (!kept[s].near(a)) continue;
            kept[s].overlaps(a, false, iou);
            LANES for (int64_t l = 0; l < kBlock; ++l) {
              const int32_t over = iou[l] > t;
              any |= over;
            }
          }
          if (any) continue;
          keep[g.rows[k]] = 1;
          if (n % kBlock == 0) kept.emplace_back();
          kept.back().set(n++ % kBlock, a);
        }
      }
    });
  });
  return chosen(order, most, [&](int32_t row) { return keep[row]; });
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("rotated_iou(Tensor a, Tensor b, bool aligned, bool iof) -> Tensor");
  m.def("rotated_nms(Tensor boxes, Tensor scores, Tensor? labels, float thr, int most) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("rotated_iou", TORCH_BOX(&visdet::rotated_iou));
  m.impl("rotated_nms", TORCH_BOX(&visdet::rotated_nms));
}
