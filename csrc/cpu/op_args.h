// Tensor arguments of an op, checked and as raw pointers. For the torch edges (ops_*.cpp) only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "dtypes.h"

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The public functions word these checks for people; here they only keep a direct call of an op in bounds.
inline void check_fits(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool fits = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(fits, name, ": expected a CPU tensor whose shape fits the other arguments");
}

// The elements of a small tensor, contiguous and kept alive; null where there is no tensor.
template <class T>
struct Values {
  Values(const std::string& name, const MaybeTensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
    if (!tensor) return;
    check_fits(name, *tensor, shape);
    STD_TORCH_CHECK(tensor->scalar_type() == type, name, ": unexpected dtype");
    kept = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
    data = static_cast<const T*>(kept->const_data_ptr());
  }

  // The elements from `first` on, null where there are none.
  const T* from(int64_t first) const { return data ? data + first : nullptr; }

  MaybeTensor kept;
  const T* data = nullptr;
};

inline DType dtype_of(const std::string& name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::kFloat : type == ScalarType::Half ? DType::kHalf : DType::kBf16;
}

}  // namespace specdec
