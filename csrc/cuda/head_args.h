// The arguments of the head's ops on CUDA, checked and as raw pointers, and their outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "head.h"

namespace specdec::head {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What the three ops are given, in the order of their schemas.
struct Given {
  const Tensor& hidden;
  const Tensor& weight;
  int64_t k;
  MaybeTensor seed, offset, row, rows, row_groups, token_ids, bias, scale;
  double temperature;
  MaybeTensor temperatures;
};

template <class... Message>
void check(bool ok, const Message&... message) {
  STD_TORCH_CHECK(ok, "head: ", message...);
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
        ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::kFloat : type == ScalarType::Half ? DType::kHalf : DType::kBf16;
}

// Tensors as pointers, kept alive. The public functions word these checks for people; here they only keep a direct call
// of an op in bounds.
class Arguments {
 public:
  explicit Arguments(const Given& given) : device_(given.hidden.get_device_index()) {
    const Tensor& hidden = given.hidden;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    check(hidden.is_cuda() && hidden.dim() == 2, "hidden: expected a CUDA tensor [B, D]");
    check(hidden.size(0) <= kMost && hidden.size(1) <= kMost, "hidden: expected fewer than 2^31 of each");
    launch.hidden_type = dtype_of("hidden", hidden);
    launch.hidden = static_cast<const char*>(hidden.const_data_ptr());
    launch.hidden_stride = hidden.stride(0) * static_cast<int64_t>(hidden.element_size());
    launch.hidden_step = hidden.stride(1) * static_cast<int64_t>(hidden.element_size());
    launch.batch = static_cast<int32_t>(hidden.size(0));
    launch.dim = static_cast<int32_t>(hidden.size(1));
    check(given.k >= 1 && given.k <= kMostK, "k: expected 1..", kMostK, ", got ", given.k);
    launch.k = static_cast<int32_t>(given.k);
    set_weight(given.weight);
    set_rows(given.rows, given.row_groups, given.token_ids.has_value());

    launch.token_ids = values<int32_t>("token_ids", given.token_ids, ScalarType::Int, {launch.height});
    if (given.bias) {
      launch.bias_type = dtype_of("bias", *given.bias);
      launch.bias = values<char>("bias", given.bias, given.bias->scalar_type(), {launch.height});
    }
    const bool groups = launch.format == Format::kInt4;
    check(given.scale || launch.format <= Format::kHalf, "scale: expected beside a quantised weight");
    launch.scale = values<float>(
        "scale", given.scale, ScalarType::Float,
        groups ? std::vector<int64_t>{launch.height, launch.chunks()} : std::vector<int64_t>{launch.height});
    launch.temperature = static_cast<float>(given.temperature);
    launch.temperatures = values<float>("temperatures", given.temperatures, ScalarType::Float, {launch.batch});
    launch.seed = values<int64_t>("seed", given.seed, ScalarType::Long, {launch.batch});
    launch.offset = values<int64_t>("offset", given.offset, ScalarType::Long, {launch.batch});
    launch.row = values<int32_t>("row", given.row, ScalarType::Int, {launch.batch});
    check(given.seed.has_value() == given.offset.has_value(), "seed: expected beside offset");
  }

  Launch launch{};

 private:
  void set_weight(const Tensor& weight) {
    check(weight.is_cuda() && weight.get_device_index() == device_ && weight.dim() == 2,
          "weight: expected [V, D] on the device of hidden");
    const ScalarType type = weight.scalar_type();
    launch.format = type == ScalarType::Char            ? Format::kInt8
                    : type == ScalarType::Float8_e4m3fn ? Format::kFp8
                    : type == ScalarType::Byte          ? Format::kInt4
                                                        : static_cast<Format>(dtype_of("weight", weight));
    check(launch.format > Format::kHalf || launch.format == static_cast<Format>(launch.hidden_type),
          "weight: expected hidden's dtype or a quantised one");
    const int64_t columns = launch.format == Format::kInt4 ? int64_t{64} * launch.chunks() : launch.dim;
    check(weight.size(1) == columns, "weight: expected ", columns, " columns, got ", weight.size(1));
    check(weight.size(0) <= std::numeric_limits<int32_t>::max(), "weight: expected fewer than 2^31 rows");
    const Tensor side_by_side = columns <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    launch.weight = static_cast<const char*>(keep(side_by_side));
    launch.weight_stride = side_by_side.stride(0) * static_cast<int64_t>(weight.element_size());
    launch.row_bytes = columns * static_cast<int64_t>(weight.element_size());
    launch.height = launch.count = static_cast<int32_t>(weight.size(0));
    launch.width = width_of(launch);
  }

  void set_rows(const MaybeTensor& rows, const MaybeTensor& groups, bool named) {
    launch.lists = -1;
    check(rows || !groups, "row_groups: expected None without rows");
    if (!rows) return;
    check(!named, "rows: expected no token_ids beside it");
    check(rows->dim() == 1 || rows->dim() == 2, "rows: expected int32 [R], [B, R], or [G, R] beside row_groups");
    check(!groups || rows->dim() == 2, "rows: expected [G, R] beside row_groups");
    check(rows->dim() == 1 || groups || rows->size(0) == launch.batch, "rows: expected [B, R]");
    const int64_t lists = rows->dim() == 1 ? 1 : rows->size(0), count = rows->size(rows->dim() - 1);
    check(lists <= std::numeric_limits<int32_t>::max() && count <= std::numeric_limits<int32_t>::max(),
          "rows: expected fewer than 2^31 of each");
    launch.rows = values<int32_t>("rows", rows, ScalarType::Int, rows->sizes().vec());
    launch.row_groups = values<int32_t>("row_groups", groups, ScalarType::Int, {launch.batch});
    launch.lists = static_cast<int32_t>(lists);
    launch.count = static_cast<int32_t>(count);
    launch.rows_stride = count;
  }

  template <class T>
  const T* values(const char* name, const MaybeTensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
    if (!tensor) return nullptr;
    bool fits = tensor->is_cuda() && tensor->get_device_index() == device_ &&
                tensor->dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor->size(static_cast<int64_t>(i)) == shape[i];
    check(fits && tensor->scalar_type() == type, name,
          ": expected the device of hidden, and a shape and a dtype that fit the other arguments");
    return static_cast<const T*>(keep(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor)));
  }

  const void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.const_data_ptr();
  }

  const int32_t device_;
  std::vector<Tensor> kept_;
};

}  // namespace specdec::head
