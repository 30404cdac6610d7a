// Overlap of every pair of boxes in one pass: the table is written once, and nothing else of its size exists.
// The second boxes lie column by column, so a row of the table is made 16 or 8 numbers at a time.
#include "../best_iou/overlap.h"

namespace visdet {

enum Kind : int64_t { kIou, kIof, kGiou, kDiou, kCiou };

template <class T>
struct Columns {
  std::vector<T> x1, y1, x2, y2, area, angle;

  Columns(const T* b, int64_t n, Kind kind) : x1(n), y1(n), x2(n), y2(n), area(n), angle(kind == kCiou ? n : 0) {
    for (int64_t i = 0; i < n; ++i, b += 4) {
      x1[i] = b[0], y1[i] = b[1], x2[i] = b[2], y2[i] = b[3];
      area[i] = kind == kIof ? nan_or_zero(b) : visdet::area(b);
      if (kind == kCiou) angle[i] = slope(b);
    }
  }
  // IoF needs no area of the second box, but must not overlook a NaN in it.
  static T nan_or_zero(const T* b) {
    const bool nan = b[0] != b[0] || b[1] != b[1] || b[2] != b[2] || b[3] != b[3];
    return nan ? std::numeric_limits<T>::quiet_NaN() : T(0);
  }
  static T slope(const T* b) { return std::atan((b[2] - b[0]) / std::max(b[3] - b[1], T(kTiny))); }
};

template <class T, Kind kind>
void one_row(const T* a, const Columns<T>& b, int64_t m, T* __restrict out) {
  const T ax1 = a[0], ay1 = a[1], ax2 = a[2], ay2 = a[3], aa = area(a), angle = kind == kCiou ? Columns<T>::slope(a) : T(0);
  const T *x1 = b.x1.data(), *y1 = b.y1.data(), *x2 = b.x2.data(), *y2 = b.y2.data(), *ba = b.area.data(), *bt = b.angle.data();
  for (int64_t j = 0; j < m; ++j) {
    const T inter = side(ay1, ay2, y1[j], y2[j]) * side(ax1, ax2, x1[j], x2[j]);
    const T all = (aa + ba[j]) - inter;
    const T below = kind == kIof ? aa + ba[j] : all;
    T v = inter / std::max(below, T(kTiny));
    if constexpr (kind == kGiou || kind == kDiou || kind == kCiou) {
      const T iou = v, w = std::max(ax2, x2[j]) - std::min(ax1, x1[j]), h = std::max(ay2, y2[j]) - std::min(ay1, y1[j]);
      if constexpr (kind == kGiou) {
        v = iou - (w * h - all) / std::max(w * h, T(kTiny));
      } else {
        const T dx = ((ax1 + ax2) - x1[j]) - x2[j], dy = ((ay1 + ay2) - y1[j]) - y2[j];
        T gap = (dx * dx + dy * dy) / std::max(4 * (w * w + h * h), T(kTiny));
        if constexpr (kind == kCiou) {
          const T d = angle - bt[j], s = T(4 / (M_PI * M_PI)) * (d * d);
          gap = gap + s / std::max((1 - iou) + s, T(kTiny)) * s;
        }
        v = iou - gap;
      }
    }
    out[j] = v;
  }
}

template <class T, Kind kind>
void all_rows(const T* a, const T* b, int64_t images, int64_t n, int64_t m, T* out) {
  for (int64_t i = 0; i < images; ++i) {
    const Columns<T> cols(b + i * m * 4, m, kind);
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, 32768 / (m + 1)), [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) one_row<T, kind>(a + (i * n + r) * 4, cols, m, out + (i * n + r) * m);
    });
  }
}

// a (B,N,4), b (B,M,4) of one type f32|f64, kind -> (B,N,M)
Tensor box_iou(const Tensor& a, const Tensor& b, int64_t kind) {
  check_dense(a, "a"), check_dense(b, "b"), check_type(b, a.scalar_type(), "b");
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(2) == 4 && b.size(2) == 4, "boxes must be (B,N,4) and (B,M,4)");
  STD_TORCH_CHECK(a.size(0) == b.size(0), "boxes must be of equally many images");
  const int64_t images = a.size(0), n = a.size(1), m = b.size(1);
  Tensor out = torch::stable::empty({images, n, m}, a.scalar_type());
  float_or_double(a, "a", [&](auto zero) {
    using T = decltype(zero);
    const T *p = a.const_data_ptr<T>(), *q = b.const_data_ptr<T>();
    T* o = out.mutable_data_ptr<T>();
    switch (kind) {
      case kIou: return all_rows<T, kIou>(p, q, images, n, m, o);
      case kIof: return all_rows<T, kIof>(p, q, images, n, m, o);
      case kGiou: return all_rows<T, kGiou>(p, q, images, n, m, o);
      case kDiou: return all_rows<T, kDiou>(p, q, images, n, m, o);
      case kCiou: return all_rows<T, kCiou>(p, q, images, n, m, o);
      default: STD_TORCH_CHECK(false, "unknown kind of overlap");
    }
  });
  return out;
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("box_iou(Tensor a, Tensor b, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&visdet::box_iou));
}
