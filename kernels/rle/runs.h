// Masks as toggles: the pixel numbers, down the columns (x * h + y), at which a mask changes between background and object.
//
// Toggles rise, two at one pixel cancel, and one at the end (h * w) changes nothing, so every mask has exactly one list.
// Run lengths are its differences; COCO's text code holds each run, from the fourth on less the run two before, in
// groups of five bits, lowest first, with a sixth bit for "more follows", moved into printable letters by adding 48.
#pragma once

#include "../common.h"

#include <cstring>
#include <tuple>

namespace visdet {
inline namespace runs {

using Toggles = std::vector<uint32_t>;
using Code = std::vector<uint8_t>;

inline int64_t pixels(int64_t h, int64_t w) {
  STD_TORCH_CHECK(h >= 0 && w >= 0 && (h == 0 || w <= 2147483647 / h), "an image has at most 2^31 pixels");
  return h * w;
}

// Sorted pixel numbers, in place, to the list that is unique.
inline void tidy(Toggles& t, uint32_t end) {
  size_t n = 0;
  for (uint32_t p : t) {
    if (n && t[n - 1] == p) --n;
    else t[n++] = p;
  }
  while (n && t[n - 1] >= end) --n;
  t.resize(n);
}

inline uint8_t* write_number(uint8_t* to, int64_t x) {
  for (; x < -16 || x > 15; x >>= 5) *to++ = static_cast<uint8_t>(80 + (x & 31));
  *to++ = static_cast<uint8_t>(48 + (x & 31));
  return to;
}

inline void write_runs(Code& code, const Toggles& t, int64_t end) {
  code.resize(7 * (t.size() + 1));  // a run, or a difference of two, has at most 33 bits
  uint8_t* to = code.data();
  int64_t one = 0, two = 0, at = 0;  // the runs before
  for (size_t k = 0; k <= t.size(); ++k) {
    const int64_t next = k < t.size() ? t[k] : end, run = next - at;
    to = write_number(to, k > 2 ? run - two : run);
    two = one, one = run, at = next;
  }
  code.resize(to - code.data());
}

// False where the code breaks off, holds a negative run, or does not fill the picture exactly.
inline bool read_runs(const uint8_t* p, const uint8_t* stop, int64_t end, Toggles& t) {
  int64_t one = 0, two = 0, at = 0, k = 0;  // the run before, the one before that (0 for the first), their sum, their number
  bool empty = false;
  t.resize(stop - p);
  uint32_t* to = t.data();
  while (p < stop) {
    unsigned c = *p++ - 48u;
    int64_t x = static_cast<int64_t>(c ^ 16) - 16;  // nearly all numbers are one letter: five bits with a sign
    if (c > 31) {
      x = c & 31;
      for (int shift = 5; c & 32; shift += 5) {
        if (c > 63 || p == stop || shift > 55) return false;
        c = *p++ - 48u;
        x |= static_cast<int64_t>(c & 31) << shift;
        if (c < 32 && c & 16) x -= int64_t{32} << shift;
      }
      if (c > 31) return false;
    }
    x += two;
    if (x < 0 || x > end - at) return false;
    two = one, one = k ? x : 0, at += x;
    empty |= k && !x;
    to[k++] = static_cast<uint32_t>(at);
  }
  if (at != end) return false;
  t.resize(k);
  if (empty) tidy(t, static_cast<uint32_t>(end));
  else if (k) t.pop_back();
  return true;
}

// Finds the toggles of a rectangle of bytes 0 and 1 that arrives row by row.
//
// A row is compared with the one above it, 64 columns at a time: inside and outside an object they are alike, and the
// block is done. Differences are kept in the order found, and a counting sort by columns puts them down the columns.
class Scan {
 public:
  explicit Scan(int64_t width) : w_(width), first_(width + 1), rows_(2 * padded(width)) {}

  uint8_t* next() { return rows_.data() + (turn_ ? padded(w_) : 0); }  // where to write the coming row

  void row(uint32_t y) {
    const uint8_t *now = next(), *above = rows_.data() + (turn_ ? 0 : padded(w_));
    for (int64_t x = 0; x < w_; x += 64) {
      uint64_t a[8], b[8], any = 0;
      std::memcpy(a, now + x, 64), std::memcpy(b, above + x, 64);
      for (int k = 0; k < 8; ++k) any |= a[k] ^= b[k];
      if (!any) continue;
      for (int k = 0; k < 8; ++k)
        for (uint64_t d = a[k]; d; d &= d - 1) {
          const uint32_t col = static_cast<uint32_t>(x + 8 * k + (__builtin_ctzll(d) >> 3));
          ++first_[col + 1];
          hits_.push_back({col, y});
        }
    }
    turn_ = !turn_;
  }

  void row(const uint8_t* __restrict src, uint32_t y) {  // a row of bytes: zero or anything else
    uint8_t* __restrict dst = next();
    for (int64_t x = 0, w = w_; x < w; ++x) dst[x] = src[x] != 0;
    row(y);
  }

  // The toggles, once the rows from `top` to `bottom` are in, in an image of height h where the first column is `left`.
  Toggles finish(int64_t left, uint32_t bottom, int64_t h, int64_t w) {
    std::memset(next(), 0, w_);
    row(bottom);
    for (int64_t x = 0; x < w_; ++x) first_[x + 1] += first_[x];
    Toggles t(hits_.size());
    for (const Hit& o : hits_) t[first_[o.x]++] = static_cast<uint32_t>((left + o.x) * h + o.y);
    tidy(t, static_cast<uint32_t>(h * w));
    return t;
  }

 private:
  struct Hit { uint32_t x, y; };
  static int64_t padded(int64_t w) { return (w + 63) / 64 * 64; }

  int64_t w_;
  bool turn_ = false;
  std::vector<uint32_t> first_;
  std::vector<Hit> hits_;
  std::vector<uint8_t> rows_;
};

// Codes of several masks end to end, and where each ends.
inline std::tuple<Tensor, Tensor> join(const std::vector<Code>& codes) {
  int64_t total = 0, n = static_cast<int64_t>(codes.size());
  for (const Code& c : codes) total += static_cast<int64_t>(c.size());
  Tensor all = torch::stable::empty({total}, ScalarType::Byte), ends = torch::stable::empty({n}, ScalarType::Long);
  uint8_t* to = all.mutable_data_ptr<uint8_t>();
  int64_t *e = ends.mutable_data_ptr<int64_t>(), at = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!codes[i].empty()) std::memcpy(to + at, codes[i].data(), codes[i].size());
    e[i] = at += static_cast<int64_t>(codes[i].size());
  }
  return {all, ends};
}

}  // namespace runs
}  // namespace visdet
