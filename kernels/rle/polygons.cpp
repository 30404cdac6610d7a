// Polygons to run lengths, by the rule of COCO's own code, pixel for pixel.
//
// The rule rounds corners to fifths of a pixel, walks the outline on that grid in steps of one along the longer axis, and
// toggles a pixel wherever the walk passes the middle of a column. Only these passings matter, one in five steps of a
// flat edge and fewer of a steep one, so each is computed directly instead of walking there.
#include "runs.h"

namespace visdet {
namespace {

// a * b, rounded: a call that is not inlined cannot be fused with the addition that follows, which would round otherwise.
__attribute__((noinline)) double times(double a, double b) { return a * b; }

int64_t grid(double v) { return static_cast<int64_t>(times(5., v) + .5); }

struct Outline {
  int64_t h, w;
  Toggles t, sorted, first;

  // Down the columns. Few toggles share one, so counting by columns leaves next to nothing to sort.
  void sort() {
    const int64_t left = *std::min_element(t.begin(), t.end()) / h, n = *std::max_element(t.begin(), t.end()) / h - left + 1;
    first.assign(n + 1, 0), sorted.resize(t.size());
    for (uint32_t p : t) ++first[p / static_cast<uint32_t>(h) - left + 1];
    for (int64_t x = 0; x < n; ++x) first[x + 1] += first[x];
    for (uint32_t p : t) sorted[first[p / static_cast<uint32_t>(h) - left]++] = p;
    for (size_t k = 1; k < sorted.size(); ++k)
      for (size_t j = k; j && sorted[j - 1] > sorted[j]; --j) std::swap(sorted[j - 1], sorted[j]);
    t.swap(sorted);
  }

  // The walk steps over the middle of column x, between heights lower and upper (grid units): the pixel below toggles.
  void pass(int64_t x, int64_t v) {
    const int64_t y = v <= 2 ? 0 : std::min((v + 2) / 5, h);
    t.push_back(static_cast<uint32_t>(x * h + y));
  }

  // One edge. The walk goes in the direction in which its longer axis rises; both ends belong to it.
  void edge(int64_t xs, int64_t ys, int64_t xe, int64_t ye) {
    const int64_t dx = std::abs(xe - xs), dy = std::abs(ye - ys);
    const bool flat = dx >= dy;
    if (flat ? xs > xe : ys > ye) std::swap(xs, xe), std::swap(ys, ye);
    // Columns whose middle, 5 x + 2 to 5 x + 3 on the grid, lies between the ends.
    const int64_t lo = std::min(xs, xe), hi = std::max(xs, xe);
    const int64_t first = lo <= 2 ? 0 : (lo + 2) / 5, last = hi < 3 ? -1 : std::min((hi - 3) / 5, w - 1);
    if (first > last) return;
    const double slope = flat ? static_cast<double>(ye - ys) / dx : static_cast<double>(xe - xs) / dy;
    for (int64_t x = first; x <= last; ++x) {
      const int64_t u = 5 * x + 2;
      if (flat) {
        auto height = [&](int64_t d) { return static_cast<int64_t>(ys + times(slope, d) + .5); };
        pass(x, std::min(height(u - xs), height(u + 1 - xs)));
      } else {
        // The last step at which the column is not passed: a guess, then as the rule rounds.
        auto beyond = [&](int64_t d) { return (static_cast<int64_t>(xs + times(slope, d) + .5) > u) == (slope > 0); };
        int64_t d = std::clamp<int64_t>(static_cast<int64_t>((u + .5 - xs) / slope), 0, dy - 1);
        while (d > 0 && beyond(d)) --d;
        while (d + 1 < dy && !beyond(d + 1)) ++d;
        pass(x, ys + d);
      }
    }
  }

  Toggles ring(const double* xy, int64_t n) {
    t.clear();
    int64_t x = grid(xy[2 * n - 2]), y = grid(xy[2 * n - 1]);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t nx = grid(xy[2 * k]), ny = grid(xy[2 * k + 1]);
      edge(x, y, nx, ny);
      x = nx, y = ny;
    }
    // A column with many toggles, as a scribble has, would make the counting sort's last step slow.
    if (t.size() < 32 || static_cast<int64_t>(t.size()) > 4 * w) std::sort(t.begin(), t.end());
    else sort();
    tidy(t, static_cast<uint32_t>(h * w));
    return t;
  }
};

// Toggles of the union of several masks: how many cover the pixel changes between none and some.
Toggles unite(const std::vector<Toggles>& all) {
  if (all.size() == 1) return all[0];
  std::vector<std::pair<uint32_t, int>> steps;
  for (const Toggles& t : all)
    for (size_t k = 0; k < t.size(); ++k) steps.push_back({t[k], k % 2 ? -1 : 1});
  std::sort(steps.begin(), steps.end());
  Toggles out;
  int cover = 0;
  bool in = false;
  for (size_t k = 0; k < steps.size(); ++k) {
    cover += steps[k].second;
    if (k + 1 < steps.size() && steps[k + 1].first == steps[k].first) continue;
    if ((cover > 0) != in) out.push_back(steps[k].first), in = !in;
  }
  return out;
}

// xy (P,2) f64, points of all polygons; rings (K+1,) splits points into polygons of at least three, objects (N+1,)
// splits polygons into objects -> codes, ends of N masks of h x w
std::tuple<Tensor, Tensor> rle_polygons(const Tensor& xy, std::vector<int64_t> rings, std::vector<int64_t> objects,
                                        int64_t h, int64_t w) {
  check_dense(xy, "xy"), check_type(xy, ScalarType::Double, "xy");
  const int64_t end = pixels(h, w), k = static_cast<int64_t>(rings.size()) - 1, n = static_cast<int64_t>(objects.size()) - 1;
  const double* p = xy.const_data_ptr<double>();
  const int64_t *ring = rings.data(), *object = objects.data();
  STD_TORCH_CHECK(k >= 0 && ring[0] == 0 && ring[k] == xy.size(0), "rings must run from 0 to P");
  STD_TORCH_CHECK(n >= 0 && object[0] == 0 && object[n] == k, "objects must run from 0 to K");
  for (int64_t i = 0; i < k; ++i) STD_TORCH_CHECK(ring[i] < ring[i + 1], "a polygon has no points");
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(object[i] <= object[i + 1], "objects must rise");
  for (int64_t i = 0; i < 2 * ring[k]; ++i) STD_TORCH_CHECK(std::abs(p[i]) < 1e8, "coordinates must be below 1e8");
  std::vector<Code> codes(n);
  torch::stable::parallel_for(0, n, 64, [&](int64_t from, int64_t to) {
    Outline line{h, w, {}, {}, {}};
    for (int64_t i = from; i < to; ++i) {
      std::vector<Toggles> all;
      for (int64_t r = object[i]; end && r < object[i + 1]; ++r) all.push_back(line.ring(p + 2 * ring[r], ring[r + 1] - ring[r]));
      write_runs(codes[i], unite(all), end);
    }
  });
  return join(codes);
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("rle_polygons(Tensor xy, int[] rings, int[] objects, int h, int w) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("rle_polygons", TORCH_BOX(&visdet::rle_polygons));
}
