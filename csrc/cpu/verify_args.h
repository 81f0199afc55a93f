// The arguments that both verification ops share, checked and as raw pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "op_args.h"
#include "specdec/verify_schema.h"
#include "verify_rows.h"

namespace specdec {

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("verify: " + message);
}

// Rows are read where they lie, whatever the stride between them; only columns that do not lie side by side are copied.
inline Tensor with_unit_columns(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The rows of one model's logits, kept alive.
class Logits {
 public:
  Logits(const std::string& name, const MaybeTensor& logits, int64_t nodes, int64_t columns, const MaybeTensor& allowed,
         int64_t vocabulary) {
    rows.columns = columns;
    rows.vocabulary = vocabulary;
    if (logits) {
      check_fits(name, *logits, {nodes, columns});
      rows.type = dtype_of(name, *logits);
      rows.data = keep(*logits, &rows.stride);
    }
    if (allowed) {
      check_fits("allowed", *allowed, {nodes, (vocabulary + 31) / 32});
      check(allowed->scalar_type() == ScalarType::Int, "allowed: expected int32");
      rows.allowed = reinterpret_cast<const uint32_t*>(keep(*allowed, &rows.allowed_stride));
      rows.allowed_stride /= 4;
    }
  }

  // Every logit becomes (1 - weight) * itself + weight * the other's.
  void mix(const MaybeTensor& logits, int64_t nodes, double weight) {
    if (!logits) return;
    check_fits("reflect_logits", *logits, {nodes, rows.columns});
    check(dtype_of("reflect_logits", *logits) == rows.type, "reflect_logits: expected the dtype of target_logits");
    rows.mixed = keep(*logits, &rows.mixed_stride);
    rows.mix = static_cast<float>(weight);
  }

  LogitRows rows;

 private:
  const char* keep(const Tensor& tensor, int64_t* stride) {
    kept_.push_back(with_unit_columns(tensor));
    *stride = kept_.back().stride(0) * static_cast<int64_t>(tensor.element_size());
    return static_cast<const char*>(kept_.back().const_data_ptr());
  }

  std::vector<Tensor> kept_;
};

// Temperature and filters of each request, from [B, 4] parameters or from four numbers.
class Sampling {
 public:
  Sampling(const MaybeTensor& params, const std::vector<double>& scalars, int64_t batch)
      : given_("params", params, ScalarType::Float, {batch, 4}) {
    check(scalars.size() == 4, "scalars: expected 4 numbers, got " + std::to_string(scalars.size()));
    for (int i = 0; i < 4; ++i) common_[i] = static_cast<float>(scalars[i]);
  }

  Filters operator[](int64_t request) const {
    const float* row = given_.data ? given_.data + 4 * request : common_;
    return {row[0], row[1], row[2], row[3]};
  }

 private:
  Values<float> given_;
  float common_[4];
};

// What a batch emits: [B, width] padded with -1, and with NaN among log-probabilities.
struct Outputs {
  Outputs(const Tensor& like, int64_t batch, int64_t width, bool logprobs)
      : width(width),
        tokens(torch::stable::new_empty(like, {batch, width}, ScalarType::Int)),
        nodes(torch::stable::new_empty(like, {batch, width}, ScalarType::Int)),
        number(torch::stable::new_empty(like, {batch}, ScalarType::Int)),
        logprobs(torch::stable::new_empty(like, {batch, logprobs ? width : 0}, ScalarType::Float)),
        token_data(static_cast<int32_t*>(tokens.mutable_data_ptr())),
        node_data(static_cast<int32_t*>(nodes.mutable_data_ptr())),
        number_data(static_cast<int32_t*>(number.mutable_data_ptr())),
        logprob_data(logprobs ? static_cast<float*>(this->logprobs.mutable_data_ptr()) : nullptr) {}

  float* logprobs_of(int64_t request) const { return logprob_data ? logprob_data + request * width : nullptr; }

  void finish(int64_t request, int count) const {
    number_data[request] = count;
    const int64_t from = request * width + count, to = (request + 1) * width;
    std::fill(token_data + from, token_data + to, -1);
    std::fill(node_data + from, node_data + to, -1);
    if (logprob_data) std::fill(logprob_data + from, logprob_data + to, std::numeric_limits<float>::quiet_NaN());
  }

  const int64_t width;
  Tensor tokens, nodes, number, logprobs;
  int32_t *token_data, *node_data, *number_data;
  float* logprob_data;
};

}  // namespace specdec
