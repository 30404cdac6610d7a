// Assignment of least total cost, a table of the batch to a thread.
//
// Shortest augmenting paths (Jonker and Volgenant, 1987): `u` and `v` are prices of rows and columns that keep every
// reduced cost c - u - v at zero or above, and rows are matched one by one along a cheapest chain of exchanges. Two things
// make it quick. Most rows are matched before any search: they bid for their cheapest column and may oust its owner. And the search for the chain has no branch in
// its inner loop: a column that is settled gets the price minus infinity, so that no later distance is shorter. Rows are
// filled up to whole blocks of sixteen with columns that are settled from the start.
#include "../common.h"

#include <tuple>

namespace visdet {

constexpr int64_t kBlock = 16;
constexpr double kInf = std::numeric_limits<double>::infinity();

enum Status : int64_t { kFine, kInvalid, kInfeasible };

struct Solver {
  int64_t n = 0, m = 0, wide = 0;  // rows <= columns, columns in whole blocks
  std::vector<double> c;           // n x wide
  std::vector<double> u, v, open, dist;
  std::vector<int64_t> row_of, col_of, from, seen, settled;

  const double* row(int64_t i) const { return c.data() + i * wide; }

  Solver(int64_t rows, int64_t cols) : n(rows), m(cols), wide((cols + kBlock - 1) / kBlock * kBlock) {
    c.assign(n * wide, kInf), u.assign(n, 0), v.assign(m, 0), open.assign(wide, 0), dist.resize(wide);
    row_of.assign(m, -1), col_of.assign(n, -1), from.resize(wide);
  }

  // The least cost less the column's price in row `i`, where it is, and the second least.
  double cheapest(int64_t i, int64_t& at, double& second) const {
    const double *__restrict p = row(i), *__restrict w = open.data();
    double low[kBlock], next[kBlock];
    std::fill_n(low, kBlock, kInf), std::fill_n(next, kBlock, kInf);
    for (int64_t j = 0; j < wide; j += kBlock)
      for (int64_t k = 0; k < kBlock; ++k) {
        const double x = p[j + k] - w[j + k], more = x < low[k] ? low[k] : x;
        low[k] = x < low[k] ? x : low[k];
        next[k] = more < next[k] ? more : next[k];
      }
    const int64_t lane = std::min_element(low, low + kBlock) - low;
    const double least = low[lane];
    second = next[lane];
    for (int64_t k = 0; k < kBlock; ++k)
      if (k != lane && low[k] < second) second = low[k];
    for (at = lane; at < wide && p[at] - w[at] != least; at += kBlock) {}
    return least;
  }

  // Rows bid for columns: each takes its cheapest and lowers the column's price until its second choice is as good; an owner
  // that is ousted bids again. Prices stay valid, and only columns that are taken have one. `open` holds prices here.
  bool start() {
    std::vector<int64_t> waiting(n);
    for (int64_t i = 0; i < n; ++i) waiting[i] = n - 1 - i;
    for (int64_t bids = 4 * n; !waiting.empty() && bids > 0; --bids) {
      const int64_t i = waiting.back();
      int64_t j = -1;
      double second;
      u[i] = cheapest(i, j, second);
      if (u[i] == kInf) return false;
      waiting.pop_back();
      const int64_t owner = row_of[j];
      if (owner >= 0 && (second == kInf || !(second > u[i]))) continue;  // nothing to offer: left to the search
      if (owner >= 0) col_of[owner] = -1, waiting.push_back(owner);
      if (owner >= 0 || second != kInf) {
        if (second != kInf) open[j] -= second - u[i], v[j] = open[j], u[i] = second;
      }
      row_of[j] = i, col_of[i] = j;
    }
    return true;
  }

  // Distances through row `i`, which is itself `base` away; the least of them.
  double relax(int64_t i, double base) {
    const double *__restrict p = row(i), *__restrict w = open.data(), shift = base - u[i];
    double *__restrict d = dist.data(), low[kBlock];
    int64_t* __restrict f = from.data();
    std::fill_n(low, kBlock, kInf);
    for (int64_t j = 0; j < wide; j += kBlock)
      for (int64_t k = 0; k < kBlock; ++k) {
        const double r = (p[j + k] + shift) - w[j + k], old = d[j + k], next = r < old ? r : old;
        const double x = w[j + k] == -kInf ? kInf : next;
        f[j + k] = r < old ? i : f[j + k];
        d[j + k] = next;
        low[k] = x < low[k] ? x : low[k];
      }
    return *std::min_element(low, low + kBlock);
  }

  // The open column at distance `d`, a free one if there is one.
  int64_t nearest(double d) const {
    const double *p = dist.data(), *w = open.data();
    int64_t best = -1;
    for (int64_t j = 0; j < wide; j += kBlock) {
      int any = 0;
      for (int64_t k = 0; k < kBlock; ++k) any |= (p[j + k] == d) & (w[j + k] != -kInf);
      if (!any) continue;
      for (int64_t k = j; k < j + kBlock; ++k)
        if (p[k] == d && w[k] != -kInf) {
          if (row_of[k] < 0) return k;
          if (best < 0) best = k;
        }
    }
    return best;
  }

  // Match row `i`: grow a tree of exchanges until a free column is reached, adapt the prices, exchange.
  bool augment(int64_t i) {
    std::copy(v.begin(), v.end(), open.begin()), std::fill(open.begin() + m, open.end(), -kInf);
    std::fill(dist.begin(), dist.end(), kInf);
    seen.assign(1, i), settled.clear();
    double base = 0;
    int64_t j = -1;
    for (int64_t r = i;; r = row_of[j]) {
      if (r != i) seen.push_back(r);
      base = relax(r, base);
      if (base == kInf) return false;
      j = nearest(base);
      settled.push_back(j);
      open[j] = -kInf;
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
    if (!start()) return false;
    for (int64_t i = 0; i < n; ++i)
      if (col_of[i] < 0 && !augment(i)) return false;
    return true;
  }
};

// The first `k` columns of one table (rows,cols); matched pairs by rising row, -1 behind them.
template <class T>
Status one_table(const T* cost, int64_t rows, int64_t cols, int64_t k, int64_t* at_row, int64_t* at_col) {
  const bool turned = k < rows;
  Solver s(std::min(rows, k), std::max(rows, k));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const double x = cost[i * cols + j];
      if (!(x > -kInf)) return kInvalid;
      s.c[turned ? j * s.wide + i : i * s.wide + j] = x;
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
