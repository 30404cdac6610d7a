// Greedy suppression within classes. Rows come grouped by class, each class by falling score.
//
// A box is compared with the boxes already kept of its class only, sixteen at a time, and stops at the first block that
// covers it. Kept boxes lie in four arrays (x1, y1, x2, y2), so a block is a handful of vector instructions. Classes are
// independent and run in parallel. No coordinates are shifted, so none can overflow.
#include "../common.h"

namespace visdet {

constexpr int64_t kBlock = 16;

// Kept boxes of one class, column by column, filled up to whole blocks with boxes that overlap nothing.
template <class T>
struct Kept {
  std::vector<T> x1, y1, x2, y2, area;
  int64_t n = 0;

  void push(const T* b, T a) {
    if (n % kBlock == 0) {
      const T far = std::numeric_limits<T>::max();
      for (auto* v : {&x1, &y1}) v->resize(n + kBlock, far);
      for (auto* v : {&x2, &y2}) v->resize(n + kBlock, -far);
      area.resize(n + kBlock, T(0));
    }
    x1[n] = b[0], y1[n] = b[1], x2[n] = b[2], y2[n] = b[3], area[n] = a;
    ++n;
  }

  bool covers(const T* b, T a, T thr) const {
    const T bx1 = b[0], by1 = b[1], bx2 = b[2], by2 = b[3];
    for (int64_t s = 0; s < n; s += kBlock) {
      const T *px1 = &x1[s], *py1 = &y1[s], *px2 = &x2[s], *py2 = &y2[s], *pa = &area[s];
      int any = 0;
      for (int64_t k = 0; k < kBlock; ++k) {
        const T w = std::max(T(0), std::min(bx2, px2[k]) - std::max(bx1, px1[k]));
        const T h = std::max(T(0), std::min(by2, py2[k]) - std::max(by1, py1[k]));
        const T inter = w * h;
        any |= inter / (pa[k] + a - inter) > thr;
      }
      if (any) return true;
    }
    return false;
  }
};

// The largest T not above the threshold: `iou > thr` then means the same in T as in double.
template <class T>
T not_above(double thr) {
  T t = static_cast<T>(thr);
  return static_cast<double>(t) > thr ? std::nextafter(t, T(-1)) : t;
}

template <class T>
void one_class(const T* boxes, int64_t n, T thr, bool* keep) {
  Kept<T> kept;
  for (int64_t i = 0; i < n; ++i) {
    const T* b = boxes + 4 * i;
    const T a = (b[2] - b[0]) * (b[3] - b[1]);
    keep[i] = !kept.covers(b, a, thr);
    if (keep[i]) kept.push(b, a);
  }
}

// boxes (N,4) f32|f64, starts (C+1,) i64 with starts[0] = 0 and starts[C] = N -> keep (N,) bool
Tensor nms_groups(const Tensor& boxes, const Tensor& starts, double thr) {
  check_dense(boxes, "boxes"), check_dense(starts, "starts"), check_type(starts, ScalarType::Long, "starts");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must be (N,4)");
  const int64_t n = boxes.size(0), groups = starts.size(0) - 1;
  const int64_t* start = starts.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(groups >= 0 && start[0] == 0 && start[groups] == n, "starts must run from 0 to N");
  Tensor keep = torch::stable::empty({n}, ScalarType::Bool);
  bool* out = keep.mutable_data_ptr<bool>();
  float_or_double(boxes, "boxes", [&](auto zero) {
    using T = decltype(zero);
    const T* b = boxes.const_data_ptr<T>();
    torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g)
        one_class<T>(b + 4 * start[g], start[g + 1] - start[g], not_above<T>(thr), out + start[g]);
    });
  });
  return keep;
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("nms_groups(Tensor boxes, Tensor starts, float thr) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("nms_groups", TORCH_BOX(&visdet::nms_groups));
}
