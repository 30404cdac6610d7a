// Connected components of bitmaps, and the boxes around bitmaps.
//
// Objects are few runs a row, so components join runs, not pixels: a run meets those of the row above that it touches,
// and a forest of parents, each smaller than its children, keeps who belongs together. A root is the first run of its
// component in reading order, which is also the order of the labels.
#include "../common.h"

#include <cstring>
#include <tuple>

namespace visdet {
namespace {

const uint8_t* bytes(const Tensor& t, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.dim() == 3 && t.element_size() == 1, name, " must be (N,H,W) of bytes");
  return static_cast<const uint8_t*>(t.data_ptr());
}

struct Run {
  int32_t y, x1, x2;  // row, first column, column after the last
};

int32_t root(std::vector<int32_t>& parent, int32_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

// Runs of one row: 8 bytes at a time while they are alike.
void runs_of(const uint8_t* row, int32_t w, int32_t y, std::vector<Run>& runs) {
  auto same = [&](int32_t x, uint64_t what) {
    uint64_t v;
    std::memcpy(&v, row + x, 8);
    return v == what;
  };
  for (int32_t x = 0; x < w;) {
    while (x + 8 <= w && same(x, 0)) x += 8;
    while (x < w && !row[x]) ++x;
    if (x >= w) return;
    const int32_t start = x;
    while (x + 8 <= w && same(x, 0x0101010101010101)) x += 8;
    while (x < w && row[x]) ++x;
    runs.push_back({y, start, x});
  }
}

// Labels of one bitmap into `out`, zeros on entry; returns how many.
int32_t label(const uint8_t* mask, int32_t h, int32_t w, int32_t reach, int32_t* out) {
  std::vector<Run> runs;
  std::vector<int32_t> parent;
  for (int32_t y = 0, above = 0, begin = 0; y < h; ++y) {
    above = begin, begin = static_cast<int32_t>(runs.size());
    runs_of(mask + static_cast<int64_t>(y) * w, w, y, runs);
    const int32_t end = static_cast<int32_t>(runs.size());
    for (int32_t i = begin, j = above; i < end; ++i) {
      parent.push_back(i);
      while (j < begin && runs[j].x2 + reach <= runs[i].x1) ++j;
      for (int32_t k = j; k < begin && runs[k].x1 < runs[i].x2 + reach; ++k) {
        const int32_t a = root(parent, i), b = root(parent, k);
        parent[std::max(a, b)] = std::min(a, b);
      }
    }
  }
  int32_t count = 0;
  std::vector<int32_t> number(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    number[i] = parent[i] == static_cast<int32_t>(i) ? ++count : number[root(parent, static_cast<int32_t>(i))];
    int32_t* row = out + static_cast<int64_t>(runs[i].y) * w;
    std::fill(row + runs[i].x1, row + runs[i].x2, number[i]);
  }
  return count;
}

// labels (N,H,W) i32, zeros on entry; masks (N,H,W) u8|bool; diagonal neighbours join or not -> counts (N,) i64
Tensor connected_components(Tensor labels, const Tensor& masks, bool diagonal) {
  const uint8_t* m = bytes(masks, "masks");
  check_dense(labels, "labels"), check_type(labels, ScalarType::Int, "labels");
  const int64_t n = masks.size(0), h = masks.size(1), w = masks.size(2);
  STD_TORCH_CHECK(labels.dim() == 3 && labels.numel() == masks.numel(), "labels must have the shape of masks");
  STD_TORCH_CHECK(h == 0 || w < 2147483647 / h, "an image has at most 2^31 pixels");
  int32_t* out = labels.mutable_data_ptr<int32_t>();
  Tensor counts = torch::stable::empty({n}, ScalarType::Long);
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, n, 1, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      c[i] = label(m + i * h * w, static_cast<int32_t>(h), static_cast<int32_t>(w), diagonal, out + i * h * w);
  });
  return counts;
}

// masks (N,H,W) u8|bool -> boxes (N,4) f32 xyxy around the non-zero pixels, zeros where there are none
Tensor masks_to_boxes(const Tensor& masks) {
  const uint8_t* m = bytes(masks, "masks");
  const int64_t n = masks.size(0), h = masks.size(1), w = masks.size(2);
  Tensor boxes = torch::stable::empty({n, 4}, ScalarType::Float);
  float* out = boxes.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, n, 1, [=](int64_t from, int64_t to) {
    std::vector<uint8_t> cols(w);
    for (int64_t i = from; i < to; ++i) {
      std::fill(cols.begin(), cols.end(), 0);
      uint8_t* c = cols.data();
      int64_t top = h, bottom = 0;
      for (int64_t y = 0; y < h; ++y) {
        const uint8_t* row = m + (i * h + y) * w;
        uint8_t any = 0;
        for (int64_t x = 0; x < w; ++x) any |= row[x], c[x] |= row[x];
        if (any) top = std::min(top, y), bottom = y + 1;
      }
      int64_t left = 0, right = bottom ? w : 0;
      while (left < right && !c[left]) ++left;
      while (right > left && !c[right - 1]) --right;
      const int64_t box[4] = {left, bottom ? top : 0, right, bottom};
      for (int k = 0; k < 4; ++k) out[4 * i + k] = static_cast<float>(box[k]);
    }
  });
  return boxes;
}

}  // namespace
}  // namespace visdet

STABLE_TORCH_LIBRARY_FRAGMENT(visdet, m) {
  m.def("connected_components(Tensor(a!) labels, Tensor masks, bool diagonal) -> Tensor");
  m.def("masks_to_boxes(Tensor masks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(visdet, CPU, m) {
  m.impl("connected_components", TORCH_BOX(&visdet::connected_components));
  m.impl("masks_to_boxes", TORCH_BOX(&visdet::masks_to_boxes));
}
