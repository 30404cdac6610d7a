// Intersection over union of two boxes, operation by operation as `visdet.cv.box_iou` computes it, so that results are
// equal to the last bit. A multiplication and a subtraction must therefore not melt into one instruction.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__) && !defined(__CUDACC__)
#pragma clang fp contract(off)
#endif

#include "../common.h"

namespace visdet {

constexpr double kTiny = 1e-9;  // floor of denominators, square pixels

// std::max(x, y) is y only where x < y: a NaN in the first place stays.
template <class T>
inline T side(T a1, T a2, T b1, T b2) {
  return std::max(std::min(a2, b2) - std::max(a1, b1), T(0));
}

template <class T>
inline T area(const T* b) {
  return std::max(b[2] - b[0], T(0)) * std::max(b[3] - b[1], T(0));
}

// Is the first to be taken instead of the second? NaN is above every number, and the earlier one of two equals stays.
template <class T>
inline bool above(T x, T y) {
  return (x > y) | ((x != x) & (y == y));
}

}  // namespace visdet
