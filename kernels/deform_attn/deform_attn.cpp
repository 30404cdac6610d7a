// Multi-scale deformable attention: every query and head reads a few points of several feature maps and adds them up by weight.
//
// A reading is a weighted sum of four rows of D channels, and a row is contiguous, so the inner loops run over channels, whole
// vectors at a time. Where to read is worked out for all points of a query first, in a loop over points. A cell outside its
// map is read as a row of zeros and written to a row nobody looks at, so nothing branches. The work is ordered by image and
// head, which keeps a thread in one head's slice of the maps; backward, one thread owns that slice, so no two write to a row.
#include "../common.h"

#include <cstring>

namespace visdet {
namespace {

template <class T>
struct Simd {
  static constexpr int64_t kLanes = 64 / sizeof(T);
  typedef T Vec __attribute__((vector_size(64)));
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));

  static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(T* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

  // Four partial sums of the lanes, added to p.
  static void add_quad(T* p, Vec v) {
    Quad q[kLanes / 4], sum;
    std::memcpy(q, &v, sizeof(v)), std::memcpy(&sum, p, sizeof(sum));
    for (auto& o : q) sum += o;
    std::memcpy(p, &sum, sizeof(sum));
  }
};

struct Sizes {
  int64_t batch, cells, heads, channels, queries, points;  // points: levels times points of a level
  int64_t row() const { return heads * channels; }         // from one cell to the next
};

// The map of each point: its size, and the number of its first cell.
template <class T>
struct Maps {
  std::vector<T> h, w;
  std::vector<int32_t> ih, iw, start;

  Maps(const std::vector<int64_t>& shapes, int64_t per_level) {
    int32_t first = 0;
    for (size_t l = 0; l + 1 < shapes.size(); l += 2) {
      for (int64_t p = 0; p < per_level; ++p) {
        h.push_back(shapes[l]), w.push_back(shapes[l + 1]), ih.push_back(shapes[l]), iw.push_back(shapes[l + 1]);
        start.push_back(first);
      }
      first += shapes[l] * shapes[l + 1];
    }
  }
};

// What the points of one query read: cells (-1: outside), position inside the square of four cells, and their weights.
template <class T>
struct Taps {
  int64_t n;
  std::vector<int32_t> cell[4];
  std::vector<T> fx, fy, c[4];

  explicit Taps(int64_t n) : n(n), fx(n), fy(n) {
    for (int i = 0; i < 4; ++i) cell[i].resize(n), c[i].resize(n);
  }

  void locate(const Maps<T>& m, const T* __restrict loc, const T* __restrict weight) {
    const T *h = m.h.data(), *w = m.w.data();
    const int32_t *ih = m.ih.data(), *iw = m.iw.data(), *start = m.start.data();
    int32_t* __restrict cell0 = cell[0].data();
    int32_t* __restrict cell1 = cell[1].data();
    int32_t* __restrict cell2 = cell[2].data();
    int32_t* __restrict cell3 = cell[3].data();
    T* __restrict c0 = c[0].data();
    T* __restrict c1 = c[1].data();
    T* __restrict c2 = c[2].data();
    T* __restrict c3 = c[3].data();
    T* __restrict px = fx.data();
    T* __restrict py = fy.data();
    for (int64_t k = 0; k < n; ++k) {
      const T x = loc[2 * k] * w[k] - T(0.5), y = loc[2 * k + 1] * h[k] - T(0.5);
      const T lx = std::floor(x), ly = std::floor(y), dx = x - lx, dy = y - ly;
      const bool in = (x >= T(-1)) & (x < w[k]) & (y >= T(-1)) & (y < h[k]);  // false for NaN
      const int32_t ix = static_cast<int32_t>(in ? lx : T(-2)), iy = static_cast<int32_t>(in ? ly : T(-2));
      const bool left = ix >= 0, top = iy >= 0, right = (ix >= -1) & (ix + 1 < iw[k]), bottom = (iy >= -1) & (iy + 1 < ih[k]);
      const int32_t at = start[k] + iy * iw[k] + ix;
      cell0[k] = left & top ? at : -1, cell1[k] = right & top ? at + 1 : -1;
      cell2[k] = left & bottom ? at + iw[k] : -1, cell3[k] = right & bottom ? at + iw[k] + 1 : -1;
      const T a = weight[k] * (1 - dy), b = weight[k] * dy;
      c0[k] = a * (1 - dx), c1[k] = a * dx, c2[k] = b * (1 - dx), c3[k] = b * dx;
      px[k] = dx, py[k] = dy;
    }
  }
};

template <class T>
T* row_of(T* base, int32_t cell, int64_t row, T* other) {
  return cell < 0 ? other : base + cell * row;
}

// out += readings of N vectors of channels
template <class T, int N>
void read(const Taps<T>& t, const T* value, int64_t row, const T* zeros, T* out) {
  using S = Simd<T>;
  typename S::Vec sum[N] = {};
  for (int64_t k = 0; k < t.n; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* r = row_of(value, t.cell[i][k], row, zeros);
      for (int j = 0; j < N; ++j) sum[j] += t.c[i][k] * S::load(r + j * S::kLanes);
    }
  for (int j = 0; j < N; ++j) S::store(out + j * S::kLanes, sum[j]);
}

// For N vectors of channels: the gradient goes to the cells, and its products with the cells' values to dots (n,4,4).
template <class T, int N>
void spread(const Taps<T>& t, const T* value, T* grad, int64_t row, const T* zeros, T* waste, const T* g, T* dots) {
  using S = Simd<T>;
  typename S::Vec gs[N];
  for (int j = 0; j < N; ++j) gs[j] = S::load(g + j * S::kLanes);
  for (int64_t k = 0; k < t.n; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* r = row_of(value, t.cell[i][k], row, zeros);
      T* to = row_of(grad, t.cell[i][k], row, waste);
      typename S::Vec dot = {};
      for (int j = 0; j < N; ++j) {
        dot += S::load(r + j * S::kLanes) * gs[j];
        S::store(to + j * S::kLanes, S::load(to + j * S::kLanes) + t.c[i][k] * gs[j]);
      }
      S::add_quad(dots + 16 * k + 4 * i, dot);
    }
}

// The channels that do not fill a vector.
template <class T>
void read_rest(const Taps<T>& t, int64_t n, const T* value, int64_t row, const T* zeros, T* out) {
  std::fill(out, out + n, T(0));
  for (int64_t k = 0; k < t.n; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* r = row_of(value, t.cell[i][k], row, zeros);
      for (int64_t j = 0; j < n; ++j) out[j] += t.c[i][k] * r[j];
    }
}

template <class T>
void spread_rest(const Taps<T>& t, int64_t n, const T* value, T* grad, int64_t row, const T* zeros, T* waste, const T* g, T* dots) {
  for (int64_t k = 0; k < t.n; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* r = row_of(value, t.cell[i][k], row, zeros);
      T* to = row_of(grad, t.cell[i][k], row, waste);
      for (int64_t j = 0; j < n; ++j) dots[16 * k + 4 * i] += r[j] * g[j], to[j] += t.c[i][k] * g[j];
    }
}

// Gradients of positions and weights of one query from the products with the four cells.
template <class T>
void finish(const Taps<T>& t, const Maps<T>& m, const T* dots, const T* weight, T* __restrict d_loc, T* __restrict d_weight) {
  for (int64_t k = 0; k < t.n; ++k) {
    T d[4];
    for (int i = 0; i < 4; ++i) {
      const T* q = dots + 16 * k + 4 * i;
      d[i] = (q[0] + q[1]) + (q[2] + q[3]);
    }
    const T x = t.fx[k], y = t.fy[k];
    d_weight[k] = (1 - y) * ((1 - x) * d[0] + x * d[1]) + y * ((1 - x) * d[2] + x * d[3]);
    d_loc[2 * k] = weight[k] * m.w[k] * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]));
    d_loc[2 * k + 1] = weight[k] * m.h[k] * ((1 - x) * (d[2] - d[0]) + x * (d[3] - d[1]));
  }
}

Sizes check(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  check_dense(value, "value"), check_dense(locations, "locations"), check_dense(weights, "weights");
  check_type(locations, value.scalar_type(), "locations"), check_type(weights, value.scalar_type(), "weights");
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5, "value (B,S,H,D), locations (B,Q,H,L,P,2), weights (B,Q,H,L,P)");
  const int64_t levels = shapes.size() / 2;
  int64_t cells = 0;
  for (int64_t l = 0; l < levels; ++l) cells += shapes[2 * l] * shapes[2 * l + 1];
  STD_TORCH_CHECK(cells == value.size(1) && cells < std::numeric_limits<int32_t>::max(), "shapes do not add up to the cells of value");
  STD_TORCH_CHECK(locations.size(3) == levels && locations.size(5) == 2 && locations.size(0) == value.size(0) && locations.size(2) == value.size(2), "locations do not fit value and shapes");
  for (int i = 0; i < 5; ++i) STD_TORCH_CHECK(weights.size(i) == locations.size(i), "weights do not fit locations");
  return {value.size(0), cells, value.size(2), value.size(3), locations.size(1), levels * locations.size(4)};
}

template <class T>
void forward(const Sizes& s, const Maps<T>& maps, const T* value, const T* loc, const T* weight, T* out) {
  using S = Simd<T>;
  torch::stable::parallel_for(0, s.batch * s.heads * s.queries, 64, [&](int64_t from, int64_t to) {
    Taps<T> taps(s.points);
    const std::vector<T> zeros(s.channels, T(0));
    for (int64_t i = from; i < to; ++i) {
      const int64_t q = i % s.queries, h = i / s.queries % s.heads, b = i / s.queries / s.heads;
      const int64_t at = (b * s.queries + q) * s.heads + h;
      taps.locate(maps, loc + 2 * at * s.points, weight + at * s.points);
      const T* v = value + b * s.cells * s.row() + h * s.channels;
      T* o = out + at * s.channels;
      int64_t c = 0;
      for (; c + 2 * S::kLanes <= s.channels; c += 2 * S::kLanes) read<T, 2>(taps, v + c, s.row(), zeros.data(), o + c);
      for (; c + S::kLanes <= s.channels; c += S::kLanes) read<T, 1>(taps, v + c, s.row(), zeros.data(), o + c);
      if (c < s.channels) read_rest<T>(taps, s.channels - c, v + c, s.row(), zeros.data(), o + c);
    }
  });
}

template <class T>
void backward(const Sizes& s, const Maps<T>& maps, const T* grad, const T* value, const T* loc, const T* weight, T* d_value, T* d_loc, T* d_weight) {
  using S = Simd<T>;
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t from, int64_t to) {
    Taps<T> taps(s.points);
    const std::vector<T> zeros(s.channels, T(0));
    std::vector<T> waste(s.channels), dots(16 * s.points);
    for (int64_t i = from; i < to; ++i) {
      const int64_t h = i % s.heads, b = i / s.heads, slice = b * s.cells * s.row() + h * s.channels;
      const T* v = value + slice;
      T* dv = d_value + slice;
      for (int64_t q = 0; q < s.queries; ++q) {
        const int64_t at = (b * s.queries + q) * s.heads + h;
        const T* g = grad + at * s.channels;
        const T* w = weight + at * s.points;
        taps.locate(maps, loc + 2 * at * s.points, w);
        std::fill(dots.begin(), dots.end(), T(0));
        int64_t c = 0;
        for (; c + 2 * S::kLanes <= s.channels; c += 2 * S::kLanes) spread<T, 2>(taps, v + c, dv + c, s.row(), zeros.data(), waste.data(), g + c, dots.data());
        for (; c + S::kLanes <= s.channels; c += S::kLanes) spread<T, 1>(taps, v + c, dv + c, s.row(), zeros.data(), waste.data(), g + c, dots.data());
        if (c < s.channels) spread_rest<T>(taps, s.channels - c, v + c, dv + c, s.row(), zeros.data(), waste.data(), g + c, dots.data());
        finish<T>(taps, maps, dots.data(), w, d_loc + 2 * at * s.points, d_weight + at * s.points);
      }
    }
  });
}

}  // namespace

// value (B,S,H,D), shapes (h,w) of each level, locations (B,Q,H,L,P,2) in 0..1, weights (B,Q,H,L,P) -> (B,Q,H*D)
Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes s = check(value, shapes, locations, weights);
  Tensor out = torch::stable::new_empty(value, {s.batch, s.queries, s.row()});
  float_or_double(value, "value", [&](auto zero) {
    using T = decltype(zero);
    const Maps<T> maps(shapes, locations.size(4));
    forward<T>(s, maps, value.const_data_ptr<T>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
  return out;
}

// grad (B,Q,H*D) -> gradients of value, locations, weights
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes s = check(value, shapes, locations, weights);
  check_dense(grad, "grad"), check_type(grad, value.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.numel() == s.batch * s.queries * s.row(), "grad does not fit");
  Tensor d_value = torch::stable::new_zeros(value, {s.batch, s.cells, s.heads, s.channels});
  Tensor d_loc = torch::stable::empty_like(locations), d_weight = torch::stable::empty_like(weights);
  float_or_double(value, "value", [&](auto zero) {
    using T = decltype(zero);
    const Maps<T> maps(shapes, locations.size(4));
    backward<T>(s, maps, grad.const_data_ptr<T>(), value.const_data_ptr<T>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), d_value.mutable_data_ptr<T>(), d_loc.mutable_data_ptr<T>(), d_weight.mutable_data_ptr<T>());
  });
  return {d_value, d_loc, d_weight};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("ms_deform_attn(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def("ms_deform_attn_backward(Tensor grad, Tensor value, int[] shapes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&visdet::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&visdet::ms_deform_attn_backward));
}
