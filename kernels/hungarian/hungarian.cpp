// Assignment of least total cost, a table of the batch to a thread.
//
// Shortest augmenting paths (Jonker and Volgenant, 1987): `u` and `v` are prices of rows and columns that keep every
// reduced cost c - u - v at zero or above, and rows are matched one by one along a cheapest chain of exchanges. Two things
// make it quick. Rows whose cheapest column is still free take it at once. And the search for the chain has no branch in
// its inner loop: a column that is settled gets the price minus infinity, so that no later distance is shorter.
#include "../common.h"

#include <tuple>

namespace visdet {

enum Status : int64_t { kFine, kInvalid, kInfeasible };

struct Solver {
  int64_t n = 0, m = 0;           // rows <= columns
  std::vector<double> c;          // n x m
  std::vector<double> u, v, open, dist;
  std::vector<int64_t> row_of, col_of, from, seen, settled;

  const double* row(int64_t i) const { return c.data() + i * m; }

  void reset() {
    u.assign(n, 0), v.assign(m, 0), open.resize(m), dist.resize(m);
    row_of.assign(m, -1), col_of.assign(n, -1), from.resize(m), seen.clear(), settled.clear();
  }

  // Each row's price is its least cost; it takes that column if nobody has it.
  bool start() {
    for (int64_t i = 0; i < n; ++i) {
      const double* p = row(i);
      u[i] = *std::min_element(p, p + m);
      if (u[i] == std::numeric_limits<double>::infinity()) return false;
      for (int64_t j = 0; j < m && col_of[i] < 0; ++j)
        if (p[j] == u[i] && row_of[j] < 0) col_of[i] = j, row_of[j] = i;
    }
    return true;
  }

  // Distances through row `i`, which is itself `base` away; the least of them.
  double relax(int64_t i, double base) {
    const double *p = row(i), *w = open.data(), shift = base - u[i];
    double *d = dist.data(), least = std::numeric_limits<double>::infinity();
    int64_t* f = from.data();
    for (int64_t j = 0; j < m; ++j) {
      const double r = (p[j] + shift) - w[j];
      const bool shorter = r < d[j];
      f[j] = shorter ? i : f[j];
      d[j] = shorter ? r : d[j];
    }
    for (int64_t j = 0; j < m; ++j) {
      const double x = w[j] == -std::numeric_limits<double>::infinity() ? std::numeric_limits<double>::infinity() : d[j];
      least = x < least ? x : least;
    }
    return least;
  }

  // The open column at distance `d`, a free one if there is one.
  int64_t nearest(double d) const {
    int64_t best = -1;
    for (int64_t j = 0; j < m; ++j)
      if (dist[j] == d && open[j] != -std::numeric_limits<double>::infinity()) {
        if (row_of[j] < 0) return j;
        if (best < 0) best = j;
      }
    return best;
  }

  // Match row `i`: grow a tree of exchanges until a free column is reached, adapt the prices, exchange.
  bool augment(int64_t i) {
    std::copy(v.begin(), v.end(), open.begin());
    std::fill(dist.begin(), dist.end(), std::numeric_limits<double>::infinity());
    seen.assign(1, i), settled.clear();
    double base = 0;
    int64_t j = -1;
    for (int64_t r = i;; r = row_of[j]) {
      if (r != i) seen.push_back(r);
      base = relax(r, base);
      if (base == std::numeric_limits<double>::infinity()) return false;
      j = nearest(base);
      settled.push_back(j);
      open[j] = -std::numeric_limits<double>::infinity();
      if (row_of[j] < 0) break;
    }
    u[i] += base;
    for (size_t k = 1; k < seen.size(); ++k) u[seen[k]] += base - dist[col_of[seen[k]]];
    for (int64_t k : settled) v[k] -= base - dist[k];
    for (int64_t r = -1; r != i;) {
      r = from[j], row_of[j] = r;
      std::swap(j, col_of[r]);
    }
    return true;
  }

  bool solve() {
    reset();
    if (!start()) return false;
    for (int64_t i = 0; i < n; ++i)
      if (col_of[i] < 0 && !augment(i)) return false;
    return true;
  }
};

// The first `k` columns of one table (rows,cols); matched pairs by rising row, -1 behind them.
template <class T>
Status one_table(const T* cost, int64_t rows, int64_t cols, int64_t k, int64_t* at_row, int64_t* at_col) {
  Solver s;
  const bool turned = k < rows;
  s.n = std::min(rows, k), s.m = std::max(rows, k), s.c.resize(s.n * s.m);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const double x = cost[i * cols + j];
      if (!(x > -std::numeric_limits<double>::infinity())) return kInvalid;
      s.c[turned ? j * s.m + i : i * s.m + j] = x;
    }
  if (s.n == 0) return kFine;
  if (!s.solve()) return kInfeasible;
  const auto& mate = turned ? s.row_of : s.col_of;
  for (int64_t i = 0, o = 0; i < rows; ++i)
    if (mate[i] >= 0) at_row[o] = i, at_col[o++] = mate[i];
  return kFine;
}

// cost (B,N,M) f32|f64, counts (B,) i64 of columns that exist -> rows, cols (B,min(N,M)) i64, status (B,) i64
std::tuple<Tensor, Tensor, Tensor> hungarian(const Tensor& cost, const Tensor& counts) {
  check_dense(cost, "cost"), check_dense(counts, "counts"), check_type(counts, ScalarType::Long, "counts");
  STD_TORCH_CHECK(cost.dim() == 3 && counts.dim() == 1 && counts.size(0) == cost.size(0), "cost must be (B,N,M), counts (B,)");
  const int64_t images = cost.size(0), n = cost.size(1), m = cost.size(2), pairs = std::min(n, m);
  Tensor rows = torch::stable::full({images, pairs}, -1, ScalarType::Long), cols = torch::stable::full({images, pairs}, -1, ScalarType::Long);
  Tensor status = torch::stable::empty({images}, ScalarType::Long);
  const int64_t* k = counts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < images; ++i) STD_TORCH_CHECK(k[i] >= 0 && k[i] <= m, "counts must lie between 0 and M");
  int64_t *r = rows.mutable_data_ptr<int64_t>(), *c = cols.mutable_data_ptr<int64_t>(), *s = status.mutable_data_ptr<int64_t>();
  float_or_double(cost, "cost", [&](auto zero) {
    using T = decltype(zero);
    const T* p = cost.const_data_ptr<T>();
    torch::stable::parallel_for(0, images, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) s[i] = one_table<T>(p + i * n * m, n, m, k[i], r + i * pairs, c + i * pairs);
    });
  });
  return {rows, cols, status};
}

}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("hungarian(Tensor cost, Tensor counts) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("hungarian", TORCH_BOX(&visdet::hungarian));
}
