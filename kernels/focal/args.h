// What the focal operators ask of their arguments, on either device.
#pragma once

#include "../common.h"
#include "focal.h"

#include <optional>
#include <tuple>

namespace visdet::focal {

using vec::Brain;
using vec::Half;

// f(T, C) for the types of the logits
template <class F>
void by_type(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::Half: return f(Half{}, float{});
    case ScalarType::BFloat16: return f(Brain{}, float{});
    default: STD_TORCH_CHECK(false, "logits must be floating point");
  }
}

inline ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

using Maybe = std::optional<Tensor>;

template <class C>
const C* column(const Maybe& t, const Tensor& x, int64_t size, const char* name) {
  if (!t) return nullptr;
  check_dense(*t, name), check_type(*t, sum_type(x), name);
  STD_TORCH_CHECK(t->numel() == size, name, " has the wrong size");
  return static_cast<const C*>(t->const_data_ptr());
}

inline void check_table(const Tensor& x, const Tensor& labels) {
  check_dense(x, "logits"), check_dense(labels, "labels"), check_type(labels, ScalarType::Long, "labels");
  STD_TORCH_CHECK(x.dim() == 2 && labels.dim() == 1 && labels.size(0) == x.size(0), "logits must be (R,K), labels (R,)");
}

}  // namespace visdet::focal
