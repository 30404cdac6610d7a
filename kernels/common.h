// What every kernel of visdet needs: tensors of torch's stable ABI, checks, and a parallel loop.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace visdet {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// Pairs with torch.autocast and channels-last callers: a kernel sees dense rows or says so.
inline void check_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong type");
}

// f(type) with a value of the tensor's floating type: float or double.
template <class F>
void float_or_double(const Tensor& t, const char* name, F&& f) {
  if (t.scalar_type() == ScalarType::Float) f(float{});
  else if (t.scalar_type() == ScalarType::Double) f(double{});
  else STD_TORCH_CHECK(false, name, " must be float32 or float64");
}

}  // namespace visdet
