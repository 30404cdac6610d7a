// Deformable convolution, versions 1 and 2: every tap of the kernel reads at a place of its own.
//
// Maps come with channels last, so a reading is a weighted sum of four contiguous rows. For a run of output cells the places
// are worked out once (a loop over cells, which fills vectors), then all channels are read at them into a buffer small enough
// for a cache, and one matrix product applies the weights. Backward, gradients of maps are written by one thread for each
// block of channels, so no two write to one number; the blocks' shares in the gradient of a place are added up in order.
#include "../common.h"

#include <cstring>
#include <optional>

namespace visdet {
namespace {

constexpr int64_t kBuffer = 1 << 20;  // numbers in the buffer of readings
constexpr int64_t kBlock = 64;        // channels that one thread writes

// Sizes: images, map, channels, offset groups, weight groups, taps, output cells and channels.
struct Geometry {
  int64_t b, h, w, c, og, g, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow, o;
  int64_t k() const { return kh * kw; }
  int64_t cells() const { return oh * ow; }
  int64_t run() const { return std::min(cells(), std::max<int64_t>(32, kBuffer / (k() * c))); }
};

Geometry check(const Tensor& x, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight, const std::vector<int64_t>& geo) {
  check_dense(x, "x"), check_dense(offset, "offset"), check_dense(weight, "weight");
  check_type(offset, x.scalar_type(), "offset"), check_type(weight, x.scalar_type(), "weight");
  STD_TORCH_CHECK(x.dim() == 4 && offset.dim() == 4 && weight.dim() == 3 && geo.size() == 8, "x (B,H,W,C), offset (B,G*2*K,h,w), weight (g,O/g,K*C/g), eight numbers");
  Geometry m{x.size(0), x.size(1), x.size(2), x.size(3), 0, weight.size(0), geo[0], geo[1], geo[2], geo[3], geo[4], geo[5], geo[6], geo[7], offset.size(2), offset.size(3), weight.size(0) * weight.size(1)};
  m.og = offset.size(1) / (2 * m.k());
  STD_TORCH_CHECK(m.og > 0 && offset.size(1) == 2 * m.og * m.k() && offset.size(0) == m.b && m.c % m.og == 0, "offset does not fit x and the kernel");
  STD_TORCH_CHECK(m.g > 0 && m.c % m.g == 0 && weight.size(2) == m.k() * (m.c / m.g), "weight does not fit x and the kernel");
  STD_TORCH_CHECK(m.h * m.w < std::numeric_limits<int32_t>::max(), "the map is too large");
  if (mask) {
    check_dense(*mask, "mask"), check_type(*mask, x.scalar_type(), "mask");
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(0) == m.b && mask->size(1) == m.og * m.k() && mask->size(2) == m.oh && mask->size(3) == m.ow, "mask does not fit offset");
  }
  return m;
}

// Places of a run of n output cells, for every offset group and tap: four cells (-1: outside), position inside, mask.
template <class T>
struct Places {
  const Geometry& m;
  int64_t n = 0;
  std::vector<int32_t> cell[4];
  std::vector<T> fx, fy, mask, row, col;

  Places(const Geometry& m, int64_t run) : m(m), fx(m.og * m.k() * run), fy(fx), mask(fx), row(run), col(run) {
    for (auto& o : cell) o.resize(fx.size());
  }

  // offset and mask of one image; `first`: the first output cell of the run
  void locate(const T* offset, const T* given, int64_t first, int64_t count) {
    n = count;
    for (int64_t l = 0; l < n; ++l) row[l] = (first + l) / m.ow * m.sh - m.ph, col[l] = (first + l) % m.ow * m.sw - m.pw;
    torch::stable::parallel_for(0, m.og * m.k(), 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const int64_t at = t * m.cells() + first, k = t % m.k();
        const T* off = offset + 2 * t * m.cells() + first;
        one(t, off, off + m.cells(), T(k / m.kw * m.dh), T(k % m.kw * m.dw));
        if (given) std::copy(given + at, given + at + n, &mask[t * n]);
        else std::fill(&mask[t * n], &mask[t * n] + n, T(1));
      }
    });
  }

  void one(int64_t t, const T* __restrict off_y, const T* __restrict off_x, T ky, T kx) {
    const int32_t h = m.h, w = m.w;
    int32_t *__restrict c0 = &cell[0][t * n], *__restrict c1 = &cell[1][t * n], *__restrict c2 = &cell[2][t * n], *__restrict c3 = &cell[3][t * n];
    T *__restrict px = &fx[t * n], *__restrict py = &fy[t * n];
    const T *r = row.data(), *c = col.data();
    for (int64_t l = 0; l < n; ++l) {
      const T y = r[l] + ky + off_y[l], x = c[l] + kx + off_x[l], ly = std::floor(y), lx = std::floor(x);
      const bool in = (x >= T(-1)) & (x < T(w)) & (y >= T(-1)) & (y < T(h));  // false for NaN
      const int32_t ix = static_cast<int32_t>(in ? lx : T(-2)), iy = static_cast<int32_t>(in ? ly : T(-2));
      const bool left = ix >= 0, top = iy >= 0, right = (ix >= -1) & (ix + 1 < w), bottom = (iy >= -1) & (iy + 1 < h);
      const int32_t at = iy * w + ix;
      c0[l] = left & top ? at : -1, c1[l] = right & top ? at + 1 : -1;
      c2[l] = left & bottom ? at + w : -1, c3[l] = right & bottom ? at + w + 1 : -1;
      px[l] = in ? x - lx : (x != x ? x : T(0)), py[l] = in ? y - ly : (y != y ? y : T(0));
    }
  }

  void shares(int64_t i, T* s) const {
    const T x = fx[i], y = fy[i];
    s[0] = (1 - y) * (1 - x), s[1] = (1 - y) * x, s[2] = y * (1 - x), s[3] = y * x;
  }
};

// Calls f(from, to, offset group) for stretches of channels, at most `most` long, that share offset group and weight group.
template <class F>
void stretches(const Geometry& m, int64_t most, F&& f) {
  const int64_t per_og = m.c / m.og, per_g = m.c / m.g;
  for (int64_t c = 0; c < m.c;) {
    const int64_t to = std::min({m.c, c + most, (c / per_og + 1) * per_og, (c / per_g + 1) * per_g});
    f(c, to, c / per_og);
    c = to;
  }
}

// Where the readings of channel c at output cell l and tap k lie in a buffer (g, run, K*C/g).
inline int64_t slot(const Geometry& m, int64_t run, int64_t c, int64_t l, int64_t k) {
  const int64_t per = m.c / m.g;
  return ((c / per) * run + l) * m.k() * per + k * per + c % per;
}

// All channels at all places of a run.
template <class T>
void read(const Places<T>& p, const T* x, const T* zeros, T* cols, int64_t run) {
  const Geometry& m = p.m;
  torch::stable::parallel_for(0, p.n, 8, [&](int64_t from, int64_t to) {
    for (int64_t l = from; l < to; ++l)
      stretches(m, m.c, [&](int64_t c0, int64_t c1, int64_t og) {
        for (int64_t k = 0; k < m.k(); ++k) {
          const int64_t i = (og * m.k() + k) * p.n + l;
          T s[4];
          p.shares(i, s);
          const T* r[4];
          for (int j = 0; j < 4; ++j) s[j] *= p.mask[i], r[j] = p.cell[j][i] < 0 ? zeros : x + p.cell[j][i] * m.c + c0;
          T* __restrict to = cols + slot(m, run, c0, l, k);
          for (int64_t c = 0; c < c1 - c0; ++c) to[c] = (s[0] * r[0][c] + s[1] * r[1][c]) + (s[2] * r[2][c] + s[3] * r[3][c]);
        }
      });
  });
}

// One block of channels: its gradient goes to the map, its products with the four cells to dots (place, 4).
template <class T>
void spread(const Places<T>& p, const T* x, T* dx, const T* zeros, T* waste, const T* cols, int64_t c0, int64_t n, int64_t og, T* dots) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  const Geometry& m = p.m;
  for (int64_t l = 0; l < p.n; ++l)
    for (int64_t k = 0; k < m.k(); ++k) {
      const int64_t i = (og * m.k() + k) * p.n + l;
      const T* g = cols + slot(m, p.n, c0, l, k);
      T s[4];
      p.shares(i, s);
      for (int j = 0; j < 4; ++j) {
        const int32_t cell = p.cell[j][i];
        const T* r = cell < 0 ? zeros : x + cell * m.c + c0;
        T* __restrict to = cell < 0 ? waste : dx + cell * m.c + c0;
        const T a = s[j] * p.mask[i];
        T part[kLanes] = {}, sum = 0;
        int64_t c = 0;
        for (; c + kLanes <= n; c += kLanes)
          for (int64_t v = 0; v < kLanes; ++v) part[v] += r[c + v] * g[c + v], to[c + v] += a * g[c + v];
        for (; c < n; ++c) sum += r[c] * g[c], to[c] += a * g[c];
        for (int64_t v = 0; v < kLanes; ++v) sum += part[v];
        dots[(l * m.k() + k) * 4 + j] = sum;
      }
    }
}

// Gradients of offsets and masks from the products, block after block.
template <class T>
void finish(const Places<T>& p, const std::vector<int64_t>& og_of, const std::vector<T>& dots, int64_t first, T* d_off, T* d_mask) {
  const Geometry& m = p.m;
  for (size_t block = 0; block < og_of.size(); ++block)
    for (int64_t k = 0; k < m.k(); ++k) {
      const int64_t t = og_of[block] * m.k() + k;
      for (int64_t l = 0; l < p.n; ++l) {
        const T* d = &dots[((block * p.n + l) * m.k() + k) * 4];
        const T x = p.fx[t * p.n + l], y = p.fy[t * p.n + l], a = p.mask[t * p.n + l];
        d_off[2 * t * m.cells() + first + l] += a * ((1 - x) * (d[2] - d[0]) + x * (d[3] - d[1]));
        d_off[(2 * t + 1) * m.cells() + first + l] += a * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]));
        if (d_mask) d_mask[t * m.cells() + first + l] += (1 - y) * ((1 - x) * d[0] + x * d[1]) + y * ((1 - x) * d[2] + x * d[3]);
      }
    }
}

// f(image, first, count) for runs of output cells
template <class F>
void runs(const Geometry& m, F&& f) {
  for (int64_t b = 0; b < m.b; ++b)
    for (int64_t first = 0; first < m.cells(); first += m.run()) f(b, first, std::min(m.run(), m.cells() - first));
}

template <class T>
void forward(const Geometry& m, const Tensor& x, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight, Tensor& out) {
  Places<T> p(m, m.run());
  const std::vector<T> zeros(m.c, T(0));
  const int64_t per = m.o / m.g;
  Tensor cols = torch::stable::new_empty(x, {m.g, m.run(), m.k() * (m.c / m.g)});
  const Tensor w = torch::stable::transpose(weight, 1, 2);
  runs(m, [&](int64_t b, int64_t first, int64_t n) {
    p.locate(offset.const_data_ptr<T>() + b * 2 * m.og * m.k() * m.cells(), mask ? mask->const_data_ptr<T>() + b * m.og * m.k() * m.cells() : nullptr, first, n);
    read<T>(p, x.const_data_ptr<T>() + b * m.h * m.w * m.c, zeros.data(), cols.mutable_data_ptr<T>(), m.run());
    Tensor part = torch::stable::narrow(cols, 1, 0, n);
    const Tensor y = torch::stable::contiguous(torch::stable::matmul(part, w));
    T* to = out.mutable_data_ptr<T>() + (b * m.cells() + first) * m.o;
    for (int64_t g = 0; g < m.g; ++g)
      for (int64_t l = 0; l < n; ++l) std::memcpy(to + l * m.o + g * per, y.const_data_ptr<T>() + (g * n + l) * per, per * sizeof(T));
  });
}

template <class T>
void backward(const Geometry& m, const Tensor& grad, const Tensor& x, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight, Tensor& dx, Tensor& d_off, Tensor& d_mask, Tensor& d_weight) {
  Places<T> p(m, m.run());
  const std::vector<T> zeros(m.c, T(0));
  std::vector<int64_t> from, to, og_of;
  stretches(m, kBlock, [&](int64_t c0, int64_t c1, int64_t og) { from.push_back(c0), to.push_back(c1), og_of.push_back(og); });
  std::vector<T> dots(from.size() * m.run() * m.k() * 4);
  Tensor cols = torch::stable::new_empty(x, {m.g, m.run(), m.k() * (m.c / m.g)});
  const Tensor rows = torch::stable::view(grad, {m.b, m.cells(), m.g, m.o / m.g});
  runs(m, [&](int64_t b, int64_t first, int64_t n) {
    const int64_t places = m.og * m.k() * m.cells(), image = b * m.h * m.w * m.c;
    const T* xb = x.const_data_ptr<T>() + image;
    p.locate(offset.const_data_ptr<T>() + 2 * b * places, mask ? mask->const_data_ptr<T>() + b * places : nullptr, first, n);
    read<T>(p, xb, zeros.data(), cols.mutable_data_ptr<T>(), m.run());
    Tensor image_rows = torch::stable::select(rows, 0, b);
    Tensor some = torch::stable::narrow(image_rows, 0, first, n);
    const Tensor g = torch::stable::transpose(some, 0, 1);  // (g, n, O/g)
    Tensor part = torch::stable::narrow(cols, 1, 0, n);
    const Tensor dw = torch::stable::contiguous(torch::stable::matmul(torch::stable::transpose(g, 1, 2), part));
    const T* add = dw.const_data_ptr<T>();
    T* sum = d_weight.mutable_data_ptr<T>();
    for (int64_t i = 0; i < d_weight.numel(); ++i) sum[i] += add[i];
    const Tensor dcols = torch::stable::contiguous(torch::stable::matmul(g, weight));  // (g, n, K*C/g)
    torch::stable::parallel_for(0, from.size(), 1, [&](int64_t lo, int64_t hi) {
      std::vector<T> waste(kBlock);
      for (int64_t i = lo; i < hi; ++i)
        spread<T>(p, xb, dx.mutable_data_ptr<T>() + image, zeros.data(), waste.data(), dcols.const_data_ptr<T>(), from[i], to[i] - from[i], og_of[i], &dots[i * n * m.k() * 4]);
    });
    finish<T>(p, og_of, dots, first, d_off.mutable_data_ptr<T>() + 2 * b * places, mask ? d_mask.mutable_data_ptr<T>() + b * places : nullptr);
  });
}

}  // namespace

// x (B,H,W,C), offset (B,G*2*K,h,w), mask (B,G*K,h,w), weight (g,O/g,K*C/g), geometry (kernel, stride, padding, dilation) -> (B,h,w,O)
Tensor deform_conv(const Tensor& x, const Tensor& offset, std::optional<Tensor> mask, const Tensor& weight, std::vector<int64_t> geometry) {
  const Geometry m = check(x, offset, mask, weight, geometry);
  Tensor out = torch::stable::new_empty(x, {m.b, m.oh, m.ow, m.o});
  float_or_double(x, "x", [&](auto zero) { forward<decltype(zero)>(m, x, offset, mask, weight, out); });
  return out;
}

// grad (B,h,w,O) -> gradients of x, offset, mask (empty without one) and weight
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& offset, std::optional<Tensor> mask, const Tensor& weight, std::vector<int64_t> geometry) {
  const Geometry m = check(x, offset, mask, weight, geometry);
  check_dense(grad, "grad"), check_type(grad, x.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.numel() == m.b * m.cells() * m.o, "grad does not fit");
  Tensor dx = torch::stable::new_zeros(x, {m.b, m.h, m.w, m.c}), d_off = torch::stable::new_zeros(x, {m.b, 2 * m.og * m.k(), m.oh, m.ow});
  Tensor d_mask = torch::stable::new_zeros(x, {mask ? m.b : 0, m.og * m.k(), m.oh, m.ow}), d_weight = torch::stable::new_zeros(x, {m.g, m.o / m.g, m.k() * (m.c / m.g)});
  float_or_double(x, "x", [&](auto zero) { backward<decltype(zero)>(m, grad, x, offset, mask, weight, dx, d_off, d_mask, d_weight); });
  return {dx, d_off, d_mask, d_weight};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("deform_conv(Tensor x, Tensor offset, Tensor? mask, Tensor weight, int[] geometry) -> Tensor");
  m.def("deform_conv_backward(Tensor grad, Tensor x, Tensor offset, Tensor? mask, Tensor weight, int[] geometry) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&visdet::deform_conv));
  m.impl("deform_conv_backward", TORCH_BOX(&visdet::deform_conv_backward));
}
