// An op of the tests: the cut that verification finds for a row, by itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cut.h"
#include "tiers.h"

namespace specdec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Blocks {
  template <class F>
  void operator()(int64_t blocks, const F& work) const {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(i);
    });
  }
};

// NaN where a row is no distribution.
Tensor filter_cut(Tensor logits, double temperature, double top_k, double top_p, double min_p,
                  std::optional<Tensor> allowed, std::optional<Tensor> ids, std::optional<double> total) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous() &&
                      (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
                  "_filter_cut: expected contiguous logits [N, C] on the CPU, C > 0");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(temperature > 0.0, "_filter_cut: expected a temperature above 0");
  int64_t words = 0, vocabulary = columns;
  if (allowed) {
    STD_TORCH_CHECK(allowed->is_cpu() && allowed->dim() == 2 && allowed->size(0) == rows && allowed->is_contiguous() &&
                        allowed->scalar_type() == ScalarType::Int && (ids || 32 * allowed->size(1) >= columns),
                    "_filter_cut: expected contiguous int32 words [N, "
                    "ceil(V/32)] as allowed");
    words = allowed->size(1);
    vocabulary = 32 * words;
  }
  if (ids) {
    STD_TORCH_CHECK(ids->is_cpu() && ids->dim() == 1 && ids->size(0) == columns && ids->is_contiguous() &&
                        ids->scalar_type() == ScalarType::Int,
                    "_filter_cut: expected contiguous int32 ids [C]");
  }
  Tensor cuts = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  auto* out = static_cast<float*>(cuts.mutable_data_ptr());
  const Filters filters = {static_cast<float>(temperature), static_cast<float>(top_k), static_cast<float>(top_p),
                           static_cast<float>(min_p)};
  const float slope = std::min(1.0f / filters.temperature, std::numeric_limits<float>::max() / 2) * 1.44269504f;
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const Blocks run;
  CutFinder<Blocks> cut_of(*kernels().select, run);
  std::vector<BlockSum> sums(blocks);
  for (int64_t i = 0; i < rows; ++i) {
    const LogitRow row = {
        static_cast<const char*>(logits.const_data_ptr()) + i * columns * logits.element_size(),
        ids ? static_cast<const int32_t*>(ids->const_data_ptr()) : nullptr,
        allowed ? static_cast<const uint32_t*>(allowed->const_data_ptr()) + i * words : nullptr,
        columns,
        vocabulary,
        type == ScalarType::Float  ? DType::kFloat
        : type == ScalarType::Half ? DType::kHalf
                                   : DType::kBf16,
    };
    run(blocks, [&](int64_t block) { sums[block] = kernels().verify->block_sum(row, block, slope); });
    float peak = sums[0].peak;
    for (const BlockSum& sum : sums) peak = std::max(peak, sum.peak);
    double mass = 0.0;
    for (const BlockSum& sum : sums) mass += sum.sum * std::exp2((static_cast<double>(sum.peak) - peak) * slope);
    const bool sound = std::isfinite(mass) && mass > 0.0;
    out[i] = sound ? cut_of(row, peak, total.value_or(mass), filters) : std::nanf("");
  }
  return cuts;
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_FRAGMENT(specdec_kernels, m) {
  m.def(
      "_filter_cut(Tensor logits, float temperature, float top_k, float "
      "top_p, float min_p, Tensor? allowed=None, "
      "Tensor? ids=None, float? total=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) { m.impl("_filter_cut", TORCH_BOX(&specdec::filter_cut)); }
