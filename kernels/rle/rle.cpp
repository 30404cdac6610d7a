// Run lengths: from bitmaps and back, areas and boxes, union and intersection, overlap of every pair.
#include "runs.h"

namespace visdet {
namespace {

// Reads the codes of N masks in parallel: each(i, toggles). Damaged ones are reported once all are read.
template <class H, class F>
void each_mask(const Tensor& codes, const Tensor& ends, H&& total, F&& each, int64_t grain = 256) {
  check_dense(codes, "codes"), check_type(codes, ScalarType::Byte, "codes");
  check_dense(ends, "ends"), check_type(ends, ScalarType::Long, "ends");
  const int64_t n = ends.size(0), bytes = codes.size(0);
  const uint8_t* c = codes.const_data_ptr<uint8_t>();
  const int64_t* e = ends.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK((i ? e[i - 1] : 0) <= e[i] && e[i] <= bytes, "ends must rise");
  std::vector<char> bad(n, 0);
  torch::stable::parallel_for(0, n, grain, [&](int64_t from, int64_t to) {
    Toggles t;
    for (int64_t i = from; i < to; ++i) {
      bad[i] = !read_runs(c + (i ? e[i - 1] : 0), c + e[i], total(i), t);
      if (!bad[i]) each(i, t);
    }
  });
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(!bad[i], "run lengths number ", i, " are damaged");
}

// masks (N,H,W) u8|bool, non-zero is object -> codes (bytes,) u8, ends (N,) i64
std::tuple<Tensor, Tensor> rle_encode(const Tensor& masks) {
  check_dense(masks, "masks");
  STD_TORCH_CHECK(masks.dim() == 3 && masks.element_size() == 1, "masks must be (N,H,W) of bytes");
  const int64_t n = masks.size(0), h = masks.size(1), w = masks.size(2), end = pixels(h, w);
  const uint8_t* m = static_cast<const uint8_t*>(masks.data_ptr());
  std::vector<Code> codes(n);
  torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      Scan scan(w);
      for (int64_t y = 0; y < h; ++y) scan.row(m + (i * h + y) * w, static_cast<uint32_t>(y));
      write_runs(codes[i], scan.finish(0, static_cast<uint32_t>(h), h, w), end);
    }
  });
  return join(codes);
}

// out (N,H,W) u8, all zeros on entry.
//
// Each toggle is one byte in the bitmap, except those in the first row, which instead gets its values from the runs.
// Then every row takes over, by exclusive or, the row above: only the mask's own columns, in whole vectors.
void rle_decode(Tensor out, const Tensor& codes, const Tensor& ends) {
  check_dense(out, "out"), check_type(out, ScalarType::Byte, "out");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == ends.size(0), "out must be (N,H,W)");
  const int64_t h = out.size(1), w = out.size(2), end = pixels(h, w);
  uint8_t* o = out.mutable_data_ptr<uint8_t>();
  each_mask(codes, ends, [=](int64_t) { return end; }, [=](int64_t i, Toggles& t) {
    if (t.empty()) return;
    uint8_t* m = o + i * end;
    const int64_t left = t[0] / h, right = ((t.size() % 2 ? end : t.back()) - 1) / h + 1;
    for (uint32_t p : t) {
      const int64_t x = p / static_cast<uint32_t>(h), y = p - x * h;
      if (y) m[y * w + x] ^= 1;
    }
    for (size_t k = 0; k < t.size(); k += 2) {
      const int64_t s = (t[k] + h - 1) / h, e = ((k + 1 < t.size() ? t[k + 1] : end) + h - 1) / h;
      for (int64_t x = s; x < e; ++x) m[x] = 1;
    }
    for (int64_t y = 1; y < h; ++y) {
      uint8_t *now = m + y * w, *above = now - w;
      for (int64_t x = left; x < right; ++x) now[x] ^= above[x];
    }
  }, 1);
}

// What overlap needs to know of a mask: its toggles in pairs, its area, and the box around it (ends excluded).
struct Runs {
  Toggles t;
  int64_t area = 0, x1 = 0, y1 = 0, x2 = 0, y2 = 0;

  void measure(int64_t h, int64_t end) {
    if (t.size() % 2) t.push_back(static_cast<uint32_t>(end));
    if (t.empty()) return;
    x1 = t.front() / h, x2 = (t.back() - 1) / h + 1, y1 = h;
    for (size_t k = 0; k < t.size(); k += 2) {
      const uint32_t s = t[k], e = t[k + 1] - 1, n = static_cast<uint32_t>(h), top = s % n;
      area += e - s + 1;
      const bool one_column = top + (e - s) < n;
      y1 = std::min<int64_t>(y1, one_column ? top : 0);
      y2 = std::max<int64_t>(y2, one_column ? top + (e - s) + 1 : h);
    }
  }
};

// codes, ends of N masks; sizes (N,2) i64 -> areas (N,) i64, boxes (N,4) f32 xyxy, zeros for an empty mask
std::tuple<Tensor, Tensor> rle_measure(const Tensor& codes, const Tensor& ends, const Tensor& sizes) {
  check_dense(sizes, "sizes"), check_type(sizes, ScalarType::Long, "sizes");
  const int64_t n = ends.size(0);
  STD_TORCH_CHECK(sizes.dim() == 2 && sizes.size(0) == n && sizes.size(1) == 2, "sizes must be (N,2)");
  const int64_t* s = sizes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) pixels(s[2 * i], s[2 * i + 1]);
  Tensor areas = torch::stable::empty({n}, ScalarType::Long), boxes = torch::stable::empty({n, 4}, ScalarType::Float);
  int64_t* a = areas.mutable_data_ptr<int64_t>();
  float* b = boxes.mutable_data_ptr<float>();
  auto total = [=](int64_t i) { return s[2 * i] * s[2 * i + 1]; };
  each_mask(codes, ends, total, [=](int64_t i, Toggles& t) {
    Runs r{t};
    r.measure(s[2 * i], total(i));
    a[i] = r.area;
    const int64_t box[4] = {r.x1, r.y1, r.x2, r.y2};
    for (int k = 0; k < 4; ++k) b[4 * i + k] = static_cast<float>(box[k]);
  });
  return {areas, boxes};
}

std::vector<Runs> read_all(const Tensor& codes, const Tensor& ends, int64_t h, int64_t end) {
  std::vector<Runs> all(ends.size(0));
  each_mask(codes, ends, [=](int64_t) { return end; }, [&](int64_t i, Toggles& t) {
    all[i].t = t;
    all[i].measure(h, end);
  });
  return all;
}

// Pixels common to two masks: two sorted lists of intervals, walked together from the first that can meet.
int64_t common(const Runs& a, const Runs& b) {
  const uint32_t from = std::max(a.t.front(), b.t.front());
  auto start = [from](const Toggles& t) { return (std::upper_bound(t.begin(), t.end(), from) - t.begin()) / 2 * 2; };
  const uint32_t *p = a.t.data() + start(a.t), *q = b.t.data() + start(b.t);
  const uint32_t *pe = a.t.data() + a.t.size(), *qe = b.t.data() + b.t.size();
  int64_t sum = 0;
  while (p < pe && q < qe) {
    const uint32_t s = std::max(p[0], q[0]), ea = p[1], eb = q[1], e = std::min(ea, eb);
    sum += e > s ? e - s : 0;
    p += ea <= eb ? 2 : 0;
    q += eb <= ea ? 2 : 0;
  }
  return sum;
}

// Masks a (N) against b (M) of one size; crowd (M,) bool -> (N,M) f64. Only masks whose boxes meet are walked.
Tensor rle_iou(const Tensor& a, const Tensor& a_ends, const Tensor& b, const Tensor& b_ends, const Tensor& crowd,
               int64_t h, int64_t w) {
  const int64_t end = pixels(h, w), n = a_ends.size(0), m = b_ends.size(0);
  check_dense(crowd, "crowd"), check_type(crowd, ScalarType::Bool, "crowd");
  STD_TORCH_CHECK(crowd.size(0) == m, "crowd must be (M,)");
  const std::vector<Runs> ra = read_all(a, a_ends, h, end), rb = read_all(b, b_ends, h, end);
  Tensor out = torch::stable::empty({n, m}, ScalarType::Double);
  double* o = out.mutable_data_ptr<double>();
  const bool* excused = crowd.const_data_ptr<bool>();
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, 2048 / (m + 1)), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const Runs &p = ra[i], &q = rb[j];
        const bool meet = std::max(p.x1, q.x1) < std::min(p.x2, q.x2) && std::max(p.y1, q.y1) < std::min(p.y2, q.y2);
        const int64_t both = meet ? common(p, q) : 0;
        o[i * m + j] = both ? static_cast<double>(both) / (excused[j] ? p.area : p.area + q.area - both) : 0.;
      }
  });
  return out;
}

// Toggles of the union or the intersection of two masks.
Toggles combine(const Toggles& a, const Toggles& b, bool intersect) {
  Toggles out;
  out.reserve(a.size() + b.size());
  bool in_a = false, in_b = false, in = false;
  for (size_t i = 0, j = 0; i < a.size() || j < b.size();) {
    const uint32_t p = std::min(i < a.size() ? a[i] : UINT32_MAX, j < b.size() ? b[j] : UINT32_MAX);
    if (i < a.size() && a[i] == p) in_a = !in_a, ++i;
    if (j < b.size() && b[j] == p) in_b = !in_b, ++j;
    const bool now = intersect ? in_a && in_b : in_a || in_b;
    if (now != in) out.push_back(p), in = now;
  }
  return out;
}

// Codes of at least one mask of one size -> the code of their union or intersection
Tensor rle_merge(const Tensor& codes, const Tensor& ends, int64_t total, bool intersect) {
  const int64_t n = ends.size(0);
  STD_TORCH_CHECK(n > 0, "there is no mask to merge");
  std::vector<Toggles> all(n);
  each_mask(codes, ends, [=](int64_t) { return total; }, [&](int64_t i, Toggles& t) { all[i] = t; });
  for (int64_t step = 1; step < n; step *= 2)  // in pairs, pairs of pairs, ...
    for (int64_t i = 0; i + step < n; i += 2 * step) all[i] = combine(all[i], all[i + step], intersect);
  std::vector<Code> code(1);
  write_runs(code[0], all[0], total);
  return std::get<0>(join(code));
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("rle_encode(Tensor masks) -> (Tensor, Tensor)");
  m.def("rle_decode(Tensor(a!) out, Tensor codes, Tensor ends) -> ()");
  m.def("rle_measure(Tensor codes, Tensor ends, Tensor sizes) -> (Tensor, Tensor)");
  m.def("rle_iou(Tensor a, Tensor a_ends, Tensor b, Tensor b_ends, Tensor crowd, int h, int w) -> Tensor");
  m.def("rle_merge(Tensor codes, Tensor ends, int total, bool intersect) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("rle_encode", TORCH_BOX(&visdet::rle_encode));
  m.impl("rle_decode", TORCH_BOX(&visdet::rle_decode));
  m.impl("rle_measure", TORCH_BOX(&visdet::rle_measure));
  m.impl("rle_iou", TORCH_BOX(&visdet::rle_iou));
  m.impl("rle_merge", TORCH_BOX(&visdet::rle_merge));
}
