// The arguments of the verification ops on CUDA, checked and as raw pointers, and their outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "specdec/verify_schema.h"
#include "verify.h"

namespace specdec::device {

using torch::headeronly::ScalarType;

// Tensors as pointers, kept alive. The public functions word these checks for people; here they only keep a direct call
// of an op in bounds.
class Arguments {
 public:
  explicit Arguments(int32_t device) : device_(device) {}

  template <class T>
  const T* values(const char* name, const MaybeTensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
    if (!tensor) return nullptr;
    check_fits(name, *tensor, shape);
    STD_TORCH_CHECK(tensor->scalar_type() == type, "verify: ", name, ": unexpected dtype");
    return static_cast<const T*>(keep(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor)));
  }

  // Rows are read where they lie, whatever the stride between them; only columns that do not lie side by side are
  // copied. `stride` becomes bytes.
  const char* rows(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, int64_t* stride) {
    check_fits(name, tensor, shape);
    const Tensor side_by_side =
        tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
    *stride = side_by_side.stride(0) * static_cast<int64_t>(tensor.element_size());
    return static_cast<const char*>(keep(side_by_side));
  }

  void fill(Side& side, const char* name, const Tensor& logits, int64_t nodes, int64_t vocabulary,
            const MaybeTensor& draft_vocab, const MaybeTensor& allowed, const MaybeTensor& params,
            const std::vector<double>& scalars, int64_t batch) {
    const int64_t columns = draft_vocab && draft_vocab->dim() == 1 ? draft_vocab->size(0) : vocabulary;
    STD_TORCH_CHECK(columns >= 1, "verify: draft_vocab: expected [R] with R >= 1");
    side.data = rows(name, logits, {nodes, columns}, &side.stride);
    side.type = dtype_of(name, logits);
    side.columns = columns;
    side.vocabulary = vocabulary;
    side.ids = values<int32_t>("draft_vocab", draft_vocab, ScalarType::Int, {columns});
    if (allowed) {
      STD_TORCH_CHECK(allowed->scalar_type() == ScalarType::Int, "verify: allowed: expected int32");
      const char* words = rows("allowed", *allowed, {nodes, (vocabulary + 31) / 32}, &side.allowed_stride);
      side.allowed = reinterpret_cast<const uint32_t*>(words);
      side.allowed_stride /= 4;
    }
    side.params = values<float>("params", params, ScalarType::Float, {batch, 4});
    STD_TORCH_CHECK(scalars.size() == 4, "verify: scalars: expected 4 numbers, got ", scalars.size());
    for (int i = 0; i < 4; ++i) side.common[i] = static_cast<float>(scalars[i]);
  }

  static DType dtype_of(const char* name, const Tensor& logits) {
    const ScalarType type = logits.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "verify: ", name, ": expected float32, bfloat16 or float16");
    return type == ScalarType::Float ? DType::kFloat : type == ScalarType::Half ? DType::kHalf : DType::kBf16;
  }

 private:
  void check_fits(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) const {
    bool fits =
        tensor.is_cuda() && tensor.get_device_index() == device_ && tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(i) == shape[i];
    STD_TORCH_CHECK(fits, "verify: ", name, ": expected the device of tokens and a shape that fits the others");
  }

  const void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.const_data_ptr();
  }

  const int32_t device_;
  std::vector<Tensor> kept_;
};

// [batch, width] each; logprobs [batch, 0] where nobody asked for them.
struct Outputs {
  Outputs(const Tensor& like, int64_t batch, int64_t width, bool logprobs)
      : tokens(torch::stable::new_empty(like, {batch, width}, ScalarType::Int)),
        nodes(torch::stable::new_empty(like, {batch, width}, ScalarType::Int)),
        number(torch::stable::new_empty(like, {batch}, ScalarType::Int)),
        logprobs(torch::stable::new_empty(like, {batch, logprobs ? width : 0}, ScalarType::Float)) {}

  Tensor tokens, nodes, number, logprobs;
};

}  // namespace specdec::device
