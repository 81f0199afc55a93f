// Rows of logits as distributions: the row primitives of specdec/walkers.h on a CPU. Blocks are read by the kernels of
// one tier, sums across blocks are taken here, in double and in block order, so that no result depends on the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tiers.h"
#include "verify.h"

namespace specdec {

// All rows of one tensor of logits.
struct LogitRows {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes from row to row
  int64_t columns = 0;
  int64_t vocabulary = 0;
  DType type = DType::kFloat;
  const int32_t* ids = nullptr;
  const uint32_t* allowed = nullptr;
  int64_t allowed_stride = 0;  // words

  LogitRow row(int64_t node) const {
    return {data + node * stride, ids, allowed ? allowed + node * allowed_stride : nullptr, columns, vocabulary, type};
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

// One row as a distribution. `aim`, then `read` every block, then `settle`.
class Distribution {
 public:
  explicit Distribution(const VerifyKernels& kernels) : kernels_(kernels) {}

  void aim(const LogitRow& row, float temperature) {
    row_ = row;
    sampled_ = temperature > 0.0f;
    // Of a temperature near 0 the reciprocal overflows; a finite one still makes 0 * slope = 0 at the peak.
    inverse_temperature_ = std::min(1.0f / temperature, std::numeric_limits<float>::max() / 2);
    softmax_.slope = inverse_temperature_ * 1.44269504f;
    sums_.resize(blocks());
  }

  int64_t blocks() const { return (row_.columns + kBlock - 1) / kBlock; }

  void read(int64_t block) {
    if (sampled_)
      sums_[block] = kernels_.block_sum(row_, block, softmax_.slope);
    else
      sums_[block].peak = kernels_.block_peak(row_, block);
  }

  // Whether the row is a distribution: no NaN, no +inf, something finite.
  bool settle() {
    point_ = -1;
    softmax_.peak = -std::numeric_limits<float>::infinity();
    for (const BlockSum& block : sums_) softmax_.peak = std::max(softmax_.peak, block.peak);
    return sampled_ ? normalise() : find_point();
  }

  float at(int32_t token) const {
    if (!sampled_) return token == point_ ? 1.0f : 0.0f;
    const int64_t column = column_of(token);
    if (column < 0) return 0.0f;
    return std::exp2((logit(column) - softmax_.peak) * softmax_.slope) * softmax_.scale;
  }

  float logprob(int32_t token) const {
    if (!sampled_) return token == point_ ? 0.0f : -std::numeric_limits<float>::infinity();
    const double shifted = static_cast<double>(logit(column_of(token))) - softmax_.peak;
    return static_cast<float>(shifted * inverse_temperature_ - std::log(total_));
  }

  bool sampled() const { return sampled_; }
  int32_t point() const { return point_; }
  const LogitRow& row() const { return row_; }
  const Softmax& softmax() const { return softmax_; }
  const std::vector<double>& masses() const { return masses_; }

 private:
  bool normalise() {
    masses_.resize(sums_.size());
    total_ = 0.0;
    for (size_t i = 0; i < sums_.size(); ++i) {
      masses_[i] = sums_[i].sum * std::exp2((static_cast<double>(sums_[i].peak) - softmax_.peak) * softmax_.slope);
      total_ += masses_[i];
    }
    softmax_.scale = static_cast<float>(1.0 / total_);
    // A block of less than this has no probability that fp32 can tell from 0, so nothing could be drawn from it.
    constexpr double kNothing = 0x1p-100;
    for (double& mass : masses_) mass = mass < kNothing * total_ ? 0.0 : mass / total_;
    return std::isfinite(total_) && total_ > 0.0;
  }

  bool find_point() {
    if (!std::isfinite(softmax_.peak)) return false;
    int64_t block = 0;
    while (sums_[block].peak != softmax_.peak) ++block;
    const int64_t column = kernels_.find(row_, block, softmax_.peak);
    point_ = row_.ids ? row_.ids[column] : static_cast<int32_t>(column);
    return true;
  }

  // -1 where the token has no probability.
  int64_t column_of(int32_t token) const {
    if (row_.allowed && !((row_.allowed[token >> 5] >> (token & 31)) & 1)) return -1;
    if (!row_.ids) return token;
    const int32_t* end = row_.ids + row_.columns;
    const int32_t* found = std::lower_bound(row_.ids, end, token);
    return found != end && *found == token ? found - row_.ids : -1;
  }

  float logit(int64_t column) const {
    switch (row_.type) {
      case DType::kFloat:
        return static_cast<const float*>(row_.logits)[column];
      case DType::kBf16:
        return static_cast<const torch::headeronly::BFloat16*>(row_.logits)[column];
      default:
        return static_cast<const torch::headeronly::Half*>(row_.logits)[column];
    }
  }

  const VerifyKernels& kernels_;
  LogitRow row_{};
  Softmax softmax_{};
  bool sampled_ = true;  // else temperature 0: a point mass
  float inverse_temperature_ = 1.0f;
  double total_ = 0.0;
  int32_t point_ = -1;  // temperature 0: the token that has all the mass
  std::vector<BlockSum> sums_;
  std::vector<double> masses_;  // [blocks] probability of each block
};

// The rows of one request, as specdec/walkers.h wants them.
class CpuRows {
 public:
  CpuRows(const LogitRows& target, const LogitRows& draft, Team team)
      : kernels_(*kernels().verify),
        target_rows_(target),
        draft_rows_(draft),
        team_(team),
        p_(kernels_),
        q_(kernels_) {}

  // `first`: packed index of the request's root.
  void start(int64_t first, float temperature, float draft_temperature) {
    first_ = first;
    temperature_ = temperature;
    draft_temperature_ = draft_temperature;
  }

  bool open(int node, bool drafted) {
    p_.aim(target_rows_.row(first_ + node), temperature_);
    const bool reads_draft = drafted && draft_rows_.data;
    // Beside a point mass p no decision depends on q; its row is only checked.
    if (reads_draft) q_.aim(draft_rows_.row(first_ + node), p_.sampled() ? draft_temperature_ : 0.0f);
    const int64_t split = p_.blocks();
    team_(split + (reads_draft ? q_.blocks() : 0), [&](int64_t i) { i < split ? p_.read(i) : q_.read(i - split); });
    const bool sound = p_.settle();
    return (!reads_draft || q_.settle()) && sound;
  }

  int32_t top(int node) {
    p_.aim(target_rows_.row(first_ + node), 0.0f);
    team_(p_.blocks(), [&](int64_t i) { p_.read(i); });
    return p_.settle() ? p_.point() : -1;
  }

  float target(int32_t token) const { return p_.at(token); }

  float draft(int32_t token) {
    point_ = draft_rows_.data ? q_.point() : token;
    if (!p_.sampled()) return 0.0f;
    return draft_rows_.data ? q_.at(token) : 1.0f;
  }

  float residual_mass(float c) {
    if (!p_.sampled()) return 1.0f;
    if (draft_rows_.data && q_.sampled()) {
      subtracted_ = q_.row();
      weighted_ = q_.softmax();
      weighted_.scale *= c;
      residual_.resize(p_.blocks());
      team_(p_.blocks(), [&](int64_t i) { residual_[i] = excess(i); });
    } else {
      // A point mass is a row of one column, and changes one block of p.
      subtracted_ = {&kPointLogit, &point_, nullptr, 1, p_.row().vocabulary, DType::kFloat};
      weighted_ = {kPointLogit, 1.0f, c};
      residual_ = p_.masses();
      if (point_ >= 0 && point_ < p_.row().columns) residual_[point_ / kBlock] = excess(point_ / kBlock);
    }
    double mass = 0.0;
    for (double block : residual_) mass += block;
    return static_cast<float>(mass);
  }

  int32_t draw(float c, float u) const {
    if (!p_.sampled()) return p_.point();
    const std::vector<double>& masses = c > 0.0f ? residual_ : p_.masses();
    double total = 0.0, before = 0.0;
    for (double block : masses) total += block;
    const double wanted = u * total;
    int64_t chosen = -1;
    double inside = 0.0;
    for (size_t i = 0; i < masses.size(); ++i) {
      if (masses[i] > 0.0) {
        chosen = static_cast<int64_t>(i);
        inside = wanted - before;
      }
      before += masses[i];
      if (before > wanted) break;
    }
    const LogitRow* q = c > 0.0f ? &subtracted_ : nullptr;
    return static_cast<int32_t>(kernels_.draw(p_.row(), p_.softmax(), q, weighted_, chosen, inside));
  }

  float logprob(int32_t token) const { return p_.logprob(token); }

 private:
  double excess(int64_t block) const { return kernels_.excess(p_.row(), p_.softmax(), &subtracted_, weighted_, block); }

  static constexpr float kPointLogit = 0.0f;

  const VerifyKernels& kernels_;
  const LogitRows& target_rows_;
  const LogitRows& draft_rows_;
  const Team team_;
  Distribution p_, q_;
  int64_t first_ = 0;
  float temperature_ = 1.0f, draft_temperature_ = 1.0f;
  int32_t point_ = -1;     // the draft's point mass, where it is one
  LogitRow subtracted_{};  // q as residual_mass left it for draw, weighted by c
  Softmax weighted_{};
  std::vector<double> residual_;  // [blocks] sums of (p - c q)+
};

}  // namespace specdec
