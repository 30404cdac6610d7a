// Pasting: small squares of probabilities, stretched bilinearly over their boxes, into images or straight to run lengths.
//
// A square is surrounded by a ring of zeros and resized as torch's `interpolate` does it, to the last bit: across first
// (few rows, computed once a mask), then down, so that a pixel costs two products. Where the result has at most 128 rows
// and columns together, torch weighs the four corners instead; so does this. Only the visible part of a box is computed.
#include "../rle/runs.h"

namespace visdet {
namespace {

// a * b + c as torch's own kernels compute it: fused where the processor can.
inline float fma_(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Where the visible positions lo to hi of n take their values from, among m: two indices, two weights.
struct Axis {
  std::vector<int32_t> i, j;
  std::vector<float> u, v;

  Axis(int64_t m, int64_t n, int64_t lo, int64_t hi) : i(hi - lo), j(hi - lo), u(hi - lo), v(hi - lo) {
    const float scale = static_cast<float>(m) / static_cast<float>(n);
    for (int64_t k = lo; k < hi; ++k) {
      const float at = std::max(fma_(scale, static_cast<float>(k) + .5f, -.5f), 0.f);
      const int64_t a = std::min(static_cast<int64_t>(at), m - 1);
      const float part = std::min(std::max(at - static_cast<float>(a), 0.f), 1.f);
      i[k - lo] = static_cast<int32_t>(a), j[k - lo] = static_cast<int32_t>(std::min(a + 1, m - 1));
      u[k - lo] = 1.f - part, v[k - lo] = part;
    }
  }
};

int64_t whole(float v) { return std::isnan(v) ? -1000000000 : static_cast<int64_t>(std::clamp(v, -1e9f, 1e9f)); }

// A mask's box in whole pixels, grown by the ring, and the part of it that lies in the image (ends excluded).
struct Place {
  int64_t x1, y1, x2, y2, l, t, r, b;

  Place(const float* box, int64_t m, int64_t h, int64_t w) {
    const float grow = static_cast<float>((m + 2.) / m);
    float lo[2], hi[2];
    for (int k = 0; k < 2; ++k) {
      const float centre = (box[k + 2] + box[k]) * .5f;
      volatile float half = (box[k + 2] - box[k]) * .5f * grow;  // volatile: rounded before it is added
      lo[k] = centre - half, hi[k] = centre + half;
    }
    x1 = whole(lo[0]), y1 = whole(lo[1]);
    x2 = std::max(whole(hi[0]), x1) + 1, y2 = std::max(whole(hi[1]), y1) + 1;
    l = std::max<int64_t>(x1, 0), t = std::max<int64_t>(y1, 0), r = std::min(x2, w), b = std::min(y2, h);
  }
  bool visible() const { return l < r && t < b; }
};

// Rows of one stretched square: row(y) is the visible part of image row t + y.
class Stretch {
 public:
  Stretch(const float* probs, int64_t m, const Place& p)
      : w_(p.r - p.l), small_(p.x2 - p.x1 + p.y2 - p.y1 <= 128), cols_(m + 2, p.x2 - p.x1, p.l - p.x1, p.r - p.x1),
        rows_(m + 2, p.y2 - p.y1, p.t - p.y1, p.b - p.y1), left_((m + 2) * w_), right_(small_ ? (m + 2) * w_ : 0), out_(w_) {
    std::vector<float> ring(m + 2, 0.f);
    const int32_t *i = cols_.i.data(), *j = cols_.j.data();
    const float *u = cols_.u.data(), *v = cols_.v.data();
    for (int64_t y = rows_.i.front(); y <= rows_.j.back(); ++y) {
      const bool inside = y > 0 && y <= m;
      for (int64_t x = 0; x < m; ++x) ring[x + 1] = inside ? probs[(y - 1) * m + x] : 0.f;
      const float* s = ring.data();
      float* a = left_.data() + y * w_;
      if (small_) {
        float* b = right_.data() + y * w_;
        for (int64_t k = 0; k < w_; ++k) a[k] = s[i[k]], b[k] = s[j[k]];
      } else {
        for (int64_t k = 0; k < w_; ++k) a[k] = fma_(s[i[k]], u[k], s[j[k]] * v[k]);
      }
    }
  }

  const float* row(int64_t y) {
    const float up = rows_.u[y], down = rows_.v[y];
    const float *a = left_.data() + rows_.i[y] * w_, *c = left_.data() + rows_.j[y] * w_;
    float* o = out_.data();
    if (small_) {
      const float *b = right_.data() + rows_.i[y] * w_, *d = right_.data() + rows_.j[y] * w_;
      const float *u = cols_.u.data(), *v = cols_.v.data();
      for (int64_t k = 0; k < w_; ++k) {
        const float top = fma_(up * u[k], a[k], up * v[k] * b[k]);
        o[k] = fma_(down * v[k], d[k], fma_(down * u[k], c[k], top));
      }
    } else {
      for (int64_t k = 0; k < w_; ++k) o[k] = fma_(a[k], up, c[k] * down);
    }
    return o;
  }

 private:
  int64_t w_;
  bool small_;
  Axis cols_, rows_;
  std::vector<float> left_, right_, out_;
};

void compare(const float* __restrict row, int64_t n, float thr, uint8_t* __restrict out) {
  for (int64_t k = 0; k < n; ++k) out[k] = row[k] > thr;
}

// Checks the inputs, then calls each(i, place, stretch) for every mask that shows, in parallel.
template <class F>
void each_place(const Tensor& probs, const Tensor& boxes, int64_t h, int64_t w, F&& each) {
  check_dense(probs, "probs"), check_type(probs, ScalarType::Float, "probs");
  check_dense(boxes, "boxes"), check_type(boxes, ScalarType::Float, "boxes");
  const int64_t n = probs.size(0), m = probs.size(1);
  STD_TORCH_CHECK(probs.dim() == 3 && probs.size(2) == m && m > 0, "probs must be (N,m,m)");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == n && boxes.size(1) == 4, "boxes must be (N,4)");
  const float *p = probs.const_data_ptr<float>(), *b = boxes.const_data_ptr<float>();
  torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Place place(b + 4 * i, m, h, w);
      if (!place.visible()) continue;
      Stretch s(p + i * m * m, m, place);
      each(i, place, s);
    }
  });
}

// out (N,H,W), zeros on entry: bool for "above the threshold", or f32 for the values themselves
void paste_masks(Tensor out, const Tensor& probs, const Tensor& boxes, double thr) {
  check_dense(out, "out");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == probs.size(0), "out must be (N,H,W)");
  const int64_t h = out.size(1), w = out.size(2);
  const bool values = out.scalar_type() == ScalarType::Float;
  if (!values) check_type(out, ScalarType::Bool, "out");
  float* f = values ? out.mutable_data_ptr<float>() : nullptr;
  uint8_t* o = values ? nullptr : static_cast<uint8_t*>(out.data_ptr());
  const float above = static_cast<float>(thr);
  each_place(probs, boxes, h, w, [=](int64_t i, const Place& p, Stretch& s) {
    for (int64_t y = p.t; y < p.b; ++y) {
      const float* row = s.row(y - p.t);
      const int64_t at = (i * h + y) * w + p.l, n = p.r - p.l;
      if (values) std::memcpy(f + at, row, n * sizeof(float));
      else compare(row, n, above, o + at);
    }
  });
}

// The same straight to codes, ends of N masks of h x w: no image is ever written.
std::tuple<Tensor, Tensor> paste_rles(const Tensor& probs, const Tensor& boxes, int64_t h, int64_t w, double thr) {
  const int64_t end = pixels(h, w);
  std::vector<Toggles> all(probs.size(0));
  const float above = static_cast<float>(thr);
  each_place(probs, boxes, h, w, [&](int64_t i, const Place& p, Stretch& s) {
    Scan scan(p.r - p.l);
    for (int64_t y = p.t; y < p.b; ++y) {
      compare(s.row(y - p.t), p.r - p.l, above, scan.next());
      scan.row(static_cast<uint32_t>(y));
    }
    all[i] = scan.finish(p.l, static_cast<uint32_t>(p.b), h, w);
  });
  std::vector<Code> codes(all.size());
  for (size_t i = 0; i < all.size(); ++i) write_runs(codes[i], all[i], end);
  return join(codes);
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("paste_masks(Tensor(a!) out, Tensor probs, Tensor boxes, float thr) -> ()");
  m.def("paste_rles(Tensor probs, Tensor boxes, int h, int w, float thr) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("paste_masks", TORCH_BOX(&visdet::paste_masks));
  m.impl("paste_rles", TORCH_BOX(&visdet::paste_rles));
}
