// Which boxes are one object: clusters for weighted box fusion.
//
// Boxes come by class and falling score. Each joins the cluster whose fused box it overlaps most, if that is more than the
// threshold, and pulls it along; otherwise it begins a cluster. Fused boxes lie in blocks of sixteen.
#include "../groups.h"

namespace visdet {

// Sums of one cluster: weight, and weight times each coordinate.
struct Sums {
  double weight = 0, box[4] = {0, 0, 0, 0};
};

inline void one_class(const double* boxes, const double* scores, int64_t from, int64_t to, double thr, int64_t* first) {
  std::vector<Block<double>> fused;
  std::vector<Sums> sums;
  std::vector<int64_t> begun;
  double inter[kBlock];
  for (int64_t i = from; i < to; ++i) {
    const double *b = boxes + 4 * i, area = (b[2] - b[0]) * (b[3] - b[1]);
    double best = thr;
    int64_t at = -1;
    for (size_t s = 0; s < fused.size(); ++s) {
      if (!fused[s].meet(b, inter)) continue;
      for (int64_t k = 0; k < kBlock; ++k) {
        const double iou = inter[k] > 0 ? inter[k] / (fused[s].area[k] + area - inter[k]) : 0;
        if (iou > best) best = iou, at = s * kBlock + k;
      }
    }
    if (at < 0) {
      at = sums.size();
      if (at % kBlock == 0) fused.emplace_back();
      sums.emplace_back(), begun.push_back(i);
    }
    Sums& o = sums[at];
    double mean[4];
    o.weight += scores[i];
    for (int d = 0; d < 4; ++d) o.box[d] += scores[i] * b[d];
    for (int d = 0; d < 4; ++d) mean[d] = o.box[d] / o.weight;
    fused[at / kBlock].set(at % kBlock, begun[at] == i || o.weight == 0 ? boxes + 4 * begun[at] : mean);
    first[i] = begun[at];
  }
}

// boxes (N,4), scores (N,) f64 by class and falling score, labels (N,) i64 -> first row of the cluster of each (N,) i64
Tensor fuse_boxes(const Tensor& boxes, const Tensor& scores, const Tensor& labels, double thr) {
  check_rows(boxes, scores, labels), check_type(boxes, ScalarType::Double, "boxes"), check_type(scores, ScalarType::Double, "scores");
  const int64_t n = boxes.size(0);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  Groups g{std::vector<int32_t>(n), {0}};
  for (int64_t i = 1; i < n; ++i)
    if (label[i] != label[i - 1]) g.start.push_back(i);
  if (n) g.start.push_back(n);
  Tensor first = torch::stable::empty({n}, ScalarType::Long);
  int64_t* out = first.mutable_data_ptr<int64_t>();
  const double *b = boxes.const_data_ptr<double>(), *s = scores.const_data_ptr<double>();
  over_groups(g, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) one_class(b, s, g.start[i], g.start[i + 1], thr, out);
  });
  return first;
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("fuse_boxes(Tensor boxes, Tensor scores, Tensor labels, float thr) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("fuse_boxes", TORCH_BOX(&visdet::fuse_boxes));
}
