// Rows of logits as distributions: the row primitives of specdec/rows.h on a CPU. Blocks are read by the kernels of one
// tier, sums across blocks are taken here, in double and in block order, so that no result depends on the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cut.h"
#include "specdec/rows.h"
#include "tiers.h"
#include "verify.h"

namespace specdec {

// All rows of one tensor of logits.
struct LogitRows {
  const char* data = nullptr;
  const char* mixed = nullptr;
  float mix = 0.0f;
  int64_t stride = 0, mixed_stride = 0;  // bytes from row to row
  int64_t columns = 0;
  int64_t vocabulary = 0;
  DType type = DType::kFloat;
  const int32_t* ids = nullptr;
  const uint32_t* allowed = nullptr;
  int64_t allowed_stride = 0;  // words

  LogitRow row(int64_t node) const {
    const uint32_t* mask = allowed ? allowed + node * allowed_stride : nullptr;
    LogitRow row = {data + node * stride, ids, mask, columns, vocabulary, type};
    row.mixed = mixed ? mixed + node * mixed_stride : nullptr;
    row.mix = mix;
    return row;
  }

  // -1 where the row has no such token, or does not allow it.
  int64_t column_of(int64_t node, int32_t token) const {
    if (allowed && !((allowed[node * allowed_stride + (token >> 5)] >> (token & 31)) & 1)) return -1;
    return column_of(token);
  }

  int64_t column_of(int32_t token) const {
    if (!ids) return token;
    const int32_t* found = std::lower_bound(ids, ids + columns, token);
    return found != ids + columns && *found == token ? found - ids : -1;
  }

  float logit(int64_t node, int64_t column) const {
    const float x = logit(data + node * stride, column);
    if (!mixed) return x;
    const float kept = (1.0f - mix) * x;
    return kept + mix * logit(mixed + node * mixed_stride, column);
  }

 private:
  float logit(const char* row, int64_t column) const {
    switch (type) {
      case DType::kFloat:
        return reinterpret_cast<const float*>(row)[column];
      case DType::kBf16:
        return reinterpret_cast<const torch::headeronly::BFloat16*>(row)[column];
      default:
        return reinterpret_cast<const torch::headeronly::Half*>(row)[column];
    }
  }
};

// Runs a function over blocks, over all threads or on the thread that is here.
struct Team {
  bool wide;

  template <class F>
  void operator()(int64_t blocks, const F& work) const {
    constexpr int64_t kGrain = 4;
    auto range = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(i);
    };
    if (wide)
      torch::stable::parallel_for(0, blocks, kGrain, range);
    else
      range(0, blocks);
  }
};

// Rows of one model under the settings of one request.
class Side {
 public:
  // Both sides of a worker share `cut_of`, because its buffers are the largest that verification has.
  Side(const LogitRows& rows, const Kernels& kernels, CutFinder<Team>& cut_of)
      : rows_(rows), kernels_(kernels), cut_of_(cut_of) {}

  // `first`: packed index of the request's root.
  void start(int64_t first, const Filters& filters) {
    first_ = first;
    filters_ = filters;
    // Of a temperature near 0 the reciprocal overflows; a finite one still makes 0 * slope = 0 at the peak.
    inverse_ = std::min(1.0f / filters.temperature, std::numeric_limits<float>::max() / 2);
    slope_ = inverse_ * 1.44269504f;
  }

  bool given() const { return rows_.data != nullptr; }
  bool sampled() const { return filters_.temperature > 0.0f; }
  int64_t blocks() const { return (rows_.columns + kBlock - 1) / kBlock; }
  float slope() const { return slope_; }

  LogitRow logits(const Row& row) const {
    LogitRow logits = rows_.row(first_ + row.node);
    logits.cut = row.cut;
    return logits;
  }

  Softmax softmax(const Row& row, double scale) const {
    return {row.peak, slope_, static_cast<float>(scale / row.total)};
  }

  // One block of what settle() needs, in any order and on any thread.
  void read(const LogitRow& logits, int64_t block) {
    if (sampled())
      sums_[block] = kernels_.verify->block_sum(logits, block, slope_);
    else
      sums_[block].peak = kernels_.verify->block_peak(logits, block);
  }
  void expect_blocks() { sums_.resize(blocks()); }

  // The row whose blocks were read; node -1 unless it is a distribution: no NaN, no +inf, something finite.
  Row settle(int node, const LogitRow& logits, const Team& team) {
    Row row = {node, -1, -std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 1.0};
    sum(&row);
    if (!sampled()) {
      if (!std::isfinite(row.peak)) return own_point();
      int64_t block = 0;
      while (sums_[block].peak != row.peak) ++block;
      const int64_t column = kernels_.verify->find(logits, block, row.peak);
      row.point = rows_.ids ? rows_.ids[column] : static_cast<int32_t>(column);
      return row.point >= 0 && row.point < rows_.vocabulary ? row : own_point();
    }
    if (!std::isfinite(row.total) || !(row.total > 0.0)) return own_point();
    if (filters_.any()) {
      row.cut = cut_of_(logits, row.peak, row.total, filters_);
      LogitRow rest = logits;
      rest.cut = row.cut;
      team(blocks(), [&](int64_t block) { read(rest, block); });
      sum(&row);
    }
    return row;
  }

  // Sums what is left of a row of which some columns, ascending, are excluded; false if nothing is.
  bool resum(Row* row, const std::vector<int32_t>& columns, const Team& team) {
    LogitRow rest = logits(*row);
    rest.excluded = columns.data();
    rest.num_excluded = static_cast<int64_t>(columns.size());
    expect_blocks();
    team(blocks(), [&](int64_t block) { read(rest, block); });
    sum(row);
    return row->total > 0.0;
  }

  // Probability of each block, of the row that was settled last.
  void masses(const Row& row, std::vector<double>* out) const {
    // A block of less than this has no probability that fp32 can tell from 0, so nothing could be drawn from it.
    constexpr double kNothing = 0x1p-100;
    out->resize(sums_.size());
    for (size_t i = 0; i < sums_.size(); ++i) {
      const double mass = mass_of(sums_[i], row.peak);
      (*out)[i] = mass < kNothing * row.total ? 0.0 : mass / row.total;
    }
  }

  float probability(const Row& row, int32_t token) const {
    if (row.point >= 0) return token == row.point ? 1.0f : 0.0f;
    const int64_t column = rows_.column_of(first_ + row.node, token);
    if (column < 0) return 0.0f;
    const float x = rows_.logit(first_ + row.node, column);
    if (x < row.cut) return 0.0f;
    return std::exp2((x - row.peak) * slope_) * static_cast<float>(1.0 / row.total);
  }

  float logprob(const Row& row, int32_t token) const {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    if (row.point >= 0) return token == row.point ? 0.0f : kNever;
    const int64_t column = rows_.column_of(first_ + row.node, token);
    const float x = column < 0 ? kNever : rows_.logit(first_ + row.node, column);
    if (x < row.cut) return kNever;
    return static_cast<float>((static_cast<double>(x) - row.peak) * inverse_ - std::log(row.total));
  }

  const LogitRows& rows() const { return rows_; }

  double mass_of(const BlockSum& block, float peak) const {
    return block.sum * std::exp2((static_cast<double>(block.peak) - peak) * slope_);
  }

 private:
  void sum(Row* row) const {
    row->peak = -std::numeric_limits<float>::infinity();
    for (const BlockSum& block : sums_) row->peak = std::max(row->peak, block.peak);
    row->total = sampled() ? 0.0 : 1.0;
    for (size_t i = 0; sampled() && i < sums_.size(); ++i) row->total += mass_of(sums_[i], row->peak);
  }

  const LogitRows& rows_;
  const Kernels& kernels_;
  CutFinder<Team>& cut_of_;
  int64_t first_ = 0;
  Filters filters_{};
  float inverse_ = 1.0f, slope_ = 1.0f;
  std::vector<BlockSum> sums_;
};

}  // namespace specdec
