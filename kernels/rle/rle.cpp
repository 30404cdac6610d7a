// Run lengths: from bitmaps and back, areas and boxes, union and intersection, overlap of every pair.
#include "runs.h"

namespace visdet {
namespace {

// Codes of N masks in one tensor of bytes, because the call of an operator costs as much as a small mask, and each tensor
// adds to it: the N lengths (i64), the codes end to end, and `tail` further bytes.
struct Codes {
  std::vector<const uint8_t*> at;

  Codes(const Tensor& t, int64_t n, int64_t tail = 0) {
    check_dense(t, "codes"), check_type(t, ScalarType::Byte, "codes");
    const int64_t bytes = t.numel() - tail;
    STD_TORCH_CHECK(t.dim() == 1 && n >= 0 && tail >= 0 && n <= bytes / 8, "codes must begin with their lengths");
    const uint8_t* p = t.const_data_ptr<uint8_t>();
    int64_t end = 8 * n, length;
    at.push_back(p + end);
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(&length, p + 8 * i, 8);
      STD_TORCH_CHECK(length >= 0 && length <= bytes - end, "codes are shorter than their lengths");
      at.push_back(p + (end += length));
    }
    STD_TORCH_CHECK(end == bytes, "codes are longer than their lengths");
  }
  int64_t size() const { return static_cast<int64_t>(at.size()) - 1; }
  const uint8_t* tail() const { return at.back(); }
};

// Reads the codes in parallel: each(i, toggles), which may take the toggles away. Damaged ones are reported at the end.
template <class H, class F>
void each_mask(const Codes& codes, H&& total, F&& each, int64_t grain = 256) {
  const int64_t n = codes.size();
  std::vector<char> bad(n, 0);
  torch::stable::parallel_for(0, n, grain, [&](int64_t from, int64_t to) {
    Toggles t;
    for (int64_t i = from; i < to; ++i) {
      bad[i] = !read_runs(codes.at[i], codes.at[i + 1], total(i), t);
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
void rle_decode(Tensor out, const Tensor& codes) {
  check_dense(out, "out"), check_type(out, ScalarType::Byte, "out");
  STD_TORCH_CHECK(out.dim() == 3, "out must be (N,H,W)");
  const int64_t h = out.size(1), w = out.size(2), end = pixels(h, w);
  uint8_t* o = out.mutable_data_ptr<uint8_t>();
  each_mask(Codes(codes, out.size(0)), [=](int64_t) { return end; }, [=](int64_t i, Toggles& t) {
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
    const uint32_t n = static_cast<uint32_t>(h);
    uint32_t column = t[0] - t[0] % n;  // where the column of s starts: most runs are in the next one, so no division
    for (size_t k = 0; k < t.size(); k += 2) {
      const uint32_t s = t[k], e = t[k + 1] - 1;
      if (s - column >= n) column += n;
      if (s - column >= n) column = s - s % n;
      const uint32_t top = s - column;
      area += e - s + 1;
      const bool one_column = top + (e - s) < n;
      y1 = std::min<int64_t>(y1, one_column ? top : 0);
      y2 = std::max<int64_t>(y2, one_column ? top + (e - s) + 1 : h);
    }
  }
};

// codes of N masks; sizes (N,2) i64 -> areas (N,) i64, boxes (N,4) f32 xyxy, zeros for an empty mask
std::tuple<Tensor, Tensor> rle_measure(const Tensor& codes, const Tensor& sizes) {
  check_dense(sizes, "sizes"), check_type(sizes, ScalarType::Long, "sizes");
  STD_TORCH_CHECK(sizes.dim() == 2 && sizes.size(1) == 2, "sizes must be (N,2)");
  const int64_t n = sizes.size(0);
  const int64_t* s = sizes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) pixels(s[2 * i], s[2 * i + 1]);
  Tensor areas = torch::stable::empty({n}, ScalarType::Long), boxes = torch::stable::empty({n, 4}, ScalarType::Float);
  int64_t* a = areas.mutable_data_ptr<int64_t>();
  float* b = boxes.mutable_data_ptr<float>();
  auto total = [=](int64_t i) { return s[2 * i] * s[2 * i + 1]; };
  each_mask(Codes(codes, n), total, [=](int64_t i, Toggles& t) {
    Runs r;
    std::swap(r.t, t);
    r.measure(s[2 * i], total(i));
    std::swap(r.t, t);
    a[i] = r.area;
    const int64_t box[4] = {r.x1, r.y1, r.x2, r.y2};
    for (int k = 0; k < 4; ++k) b[4 * i + k] = static_cast<float>(box[k]);
  });
  return {areas, boxes};
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

// N masks against M others, all of one size; a byte for each of the others that says if it is a crowd -> (N,M) f64.
// Only masks whose boxes meet are walked.
Tensor rle_iou(const Tensor& packed, int64_t n, int64_t m, int64_t h, int64_t w) {
  const int64_t end = pixels(h, w);
  STD_TORCH_CHECK(n >= 0 && m >= 0, "numbers of masks must not be negative");
  const Codes codes(packed, n + m, m);
  std::vector<Runs> all(n + m);
  each_mask(codes, [=](int64_t) { return end; }, [&](int64_t i, Toggles& t) {
    all[i].t = std::move(t);
    all[i].measure(h, end);
  });
  const Runs *ra = all.data(), *rb = ra + n;
  Tensor out = torch::stable::empty({n, m}, ScalarType::Double);
  double* o = out.mutable_data_ptr<double>();
  const uint8_t* excused = codes.tail();
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

// Toggles of the union of many masks: each run is painted into one bit a pixel, 64 at a time, and where neighbouring bits
// differ there is a toggle. An intersection is the background of the union of backgrounds.
Toggles paint(std::vector<Toggles>& all, uint32_t end, bool intersect) {
  std::vector<uint64_t> bits(end / 64 + 1, 0);
  for (Toggles& t : all) {
    if (intersect) t.insert(t.begin(), 0);  // every run becomes a gap, also one of no length
    if (t.size() % 2) t.push_back(end);
    for (size_t k = 0; k < t.size(); k += 2) {
      const uint32_t s = t[k], e = t[k + 1], a = s / 64, b = e / 64;
      const uint64_t from = ~uint64_t{0} << s % 64, to = ~(~uint64_t{0} << e % 64);
      if (a == b) {
        bits[a] |= from & to;
        continue;
      }
      bits[a] |= from, bits[b] |= to;
      for (uint32_t i = a + 1; i < b; ++i) bits[i] = ~uint64_t{0};
    }
  }
  Toggles out;
  uint64_t before = intersect;  // the bit before the first: background
  for (size_t i = 0; i < bits.size(); ++i) {
    uint64_t d = bits[i] ^ (bits[i] << 1 | before);
    before = bits[i] >> 63;
    for (; d; d &= d - 1) out.push_back(static_cast<uint32_t>(64 * i + __builtin_ctzll(d)));
  }
  while (!out.empty() && out.back() >= end) out.pop_back();
  return out;
}

// Codes of at least one mask of one size -> the code of their union or intersection
Tensor rle_merge(const Tensor& packed, int64_t n, int64_t total, bool intersect) {
  STD_TORCH_CHECK(n > 0, "there is no mask to merge");
  STD_TORCH_CHECK(total >= 0 && total <= 2147483647, "an image has at most 2^31 pixels");
  std::vector<Toggles> all(n);
  each_mask(Codes(packed, n), [=](int64_t) { return total; }, [&](int64_t i, Toggles& t) { all[i] = std::move(t); });
  int64_t toggles = 0;
  for (const Toggles& t : all) toggles += static_cast<int64_t>(t.size());
  if (n > 2 && toggles > total / 256) {  // as much work as to look at every bit
    all[0] = paint(all, static_cast<uint32_t>(total), intersect);
  } else {
    for (int64_t step = 1; step < n; step *= 2)  // in pairs, pairs of pairs, ...
      for (int64_t i = 0; i + step < n; i += 2 * step) all[i] = combine(all[i], all[i + step], intersect);
  }
  std::vector<Code> code(1);
  write_runs(code[0], all[0], total);
  return std::get<0>(join(code));
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("rle_encode(Tensor masks) -> (Tensor, Tensor)");
  m.def("rle_decode(Tensor(a!) out, Tensor codes) -> ()");
  m.def("rle_measure(Tensor codes, Tensor sizes) -> (Tensor, Tensor)");
  m.def("rle_iou(Tensor codes, int n, int m, int h, int w) -> Tensor");
  m.def("rle_merge(Tensor codes, int n, int total, bool intersect) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("rle_encode", TORCH_BOX(&visdet::rle_encode));
  m.impl("rle_decode", TORCH_BOX(&visdet::rle_decode));
  m.impl("rle_measure", TORCH_BOX(&visdet::rle_measure));
  m.impl("rle_iou", TORCH_BOX(&visdet::rle_iou));
  m.impl("rle_merge", TORCH_BOX(&visdet::rle_merge));
}
