// Filters as a cut: the logit below which top_k, top_p and min_p leave nothing of a row.
//
// Every filter keeps z = (x - peak) / temperature from a threshold on, so together they keep what is not below the
// highest of the three. Nothing is sorted. The k-th largest logit, or the one down to which the weights e^z make up
// top_p, is bracketed by a guess; a pass over the row adds up what lies above the bracket and stores what lies inside,
// and the same is done to what was stored until little is left. Guesses cost passes, never exactness.
//
// By mass, the first pass is one in fp32 whose error is bounded. Unless that error could change the answer, it stands;
// else weights are summed in fp64. So the outcome is that of fp64 sums over sorted logits, on every tier and with any
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "cut_guess.h"
#include "select.h"

namespace specdec {

struct Filters {
  float temperature, top_k, top_p, min_p;

  bool any() const { return top_k > 0.0f || top_p < 1.0f || min_p > 0.0f; }
};

// The smallest logit whose z is not below `z` <= 0; -inf if that holds for every float.
inline float lowest_logit(const Scale& scale, float z) {
  int64_t below = number_of(std::numeric_limits<float>::lowest()), from = number_of(scale.peak);
  if (!(z_of(scale, float_of(below)) < z)) return -std::numeric_limits<float>::infinity();
  while (from - below > 1) {
    const int64_t middle = below + (from - below) / 2;
    (z_of(scale, float_of(middle)) < z ? below : from) = middle;
  }
  return float_of(from);
}

// The smallest fp32 number that is not below log(min_p).
inline float lowest_z(float min_p) {
  const double exact = std::log(static_cast<double>(min_p));
  const auto z = static_cast<float>(exact);
  return z < exact ? std::nextafter(z, std::numeric_limits<float>::infinity()) : z;
}

// Its buffers, below 350 KiB and there from the first search on, serve row after row. Run: run(blocks, f) calls f(i)
// for every i in [0, blocks), in any order and on any threads.
template <class Run>
class CutFinder {
 public:
  CutFinder(const SelectKernels& kernels, const Run& run) : kernels_(kernels), run_(run), guess_(kernels) {}

  // The cut of a row that has none yet, at a temperature above 0; -inf: everything is kept. `peak` is the row's largest
  // logit, finite, and `total` about its sum of e^z, on which only the time depends.
  float operator()(const LogitRow& row, float peak, double total, const Filters& filters) {
    scale_ = {peak, filters.temperature};
    candidates_.reset();
    LogitRow left = row;
    float z = -kInfinity;
    if (filters.top_k > 0.0f && filters.top_k < static_cast<float>(row.columns)) {
      z = z_of(scale_, kth(row, std::max<int64_t>(1, static_cast<int64_t>(filters.top_k))));
      left.cut = lowest_logit(scale_, z);
    }
    if (filters.top_p < 1.0f) z = std::max(z, z_of(scale_, top_of_mass(left, filters.top_p, total)));
    if (filters.min_p > 0.0f) z = std::max(z, std::min(0.0f, lowest_z(filters.min_p)));
    return lowest_logit(scale_, z);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int kLevels = 3;
  static constexpr int64_t kRoom[kLevels] = {65536, 16384, 4096};  // logits that are stored at each level

  // All logits from `low` on, as a search left them.
  struct Candidates {
    LogitRow row;
    float low;
    int level;
  };

  float kth(const LogitRow& row, int64_t k) {
    if (k == 1) return scale_.peak;
    const Goal goal{false, static_cast<double>(row.columns), static_cast<double>(k)};
    return *search(row, goal, {}, 0);
  }

  float top_of_mass(const LogitRow& row, float share, double total) {
    if (!(share > 0.0f)) return scale_.peak;
    // Of what top_k left, all that is known is that the peak weighs 1.
    Goal goal{true, row.cut > -kInfinity ? 1.0 : total};
    goal.share = share;
    if (candidates_ && candidates_->low <= row.cut) {
      LogitRow left = candidates_->row;
      left.cut = row.cut;
      return *search(left, goal, {}, candidates_->level == 0 ? 1 : 0);
    }
    Bracket first;
    const std::optional<float> found = search_beside_tail(row, goal, &first);
    return found ? *found : *search(row, goal, {}, 0, first);
  }

  // Weighs the few logits from a guess on in fp64, the rest about. Empty if that does not decide, or is not likely to;
  // `first` is then where to begin.
  std::optional<float> search_beside_tail(const LogitRow& row, Goal goal, Bracket* first) {
    const bool bounded = scale_.temperature >= kTailColdest && scale_.temperature <= kTailHottest;
    Range range;
    for (int round = 0;; ++round) {
      const Guess guess = guess_(row, scale_, goal, range, round);
      const float low = guess.bracket.low;
      *first = guess.bracket;
      const double doubt = goal.share * kTailError * guess.below;
      if (!bounded || guess.from_low > kRoom[0] / 4 || weight_of(scale_, low) < 4.0 * doubt) return {};
      const Split beside = pass(kernels_.tail, row, {low, kInfinity}, 0);
      if (beside.stored < beside.inside) return {};
      const LogitRow head = stored(0, beside);
      const double weight = pass(kernels_.weigh, head, {kInfinity, kInfinity}, 1).total;
      Goal above{true, weight, goal.share * (weight + beside.total)};
      above.slack = goal.share * kTailError * beside.total;
      if (weight >= above.target + above.slack) return search(head, above, {low, kInfinity, 0.0}, 1);
      if (round > 0) return {};
      // Too high; but now the total is known well enough to be right the next time.
      goal.weight = weight + beside.total;
      range.high = low;
    }
  }

  // Stores at `level` and further what is inside its brackets. Empty only where the answer hangs on goal.slack.
  std::optional<float> search(const LogitRow& row, Goal goal, Range range, int level,
                              const std::optional<Bracket>& first = {}) {
    for (int round = 0;; ++round) {
      const Bracket bracket = round == 0 && first ? *first : guess_(row, scale_, goal, range, round).bracket;
      const Split split = pass(goal.by_mass ? kernels_.weigh : kernels_.count, row, bracket, level);
      if (goal.share > 0.0) {
        goal.weight = split.total;
        goal.target = goal.share * goal.weight;
        goal.share = 0.0;
      }
      const double above = goal.over + split.from_high, reached = goal.over + split.from_low;
      if (above >= goal.target) {
        range.low = bracket.high;
        range.below = goal.weight - split.from_high;
        continue;
      }
      if (reached < goal.target && bracket.low > range.low) {
        range.high = bracket.low;
        continue;
      }
      range = {bracket.low, bracket.high, goal.weight - split.from_low};
      // Not reached all the same: there are fewer finite logits than asked for, or two passes' sums round apart.
      const bool one_value = number_of(bracket.high) - number_of(bracket.low) <= 1;
      if (one_value || reached < goal.target) return checked(goal, bracket.low, above, reached);
      const bool few = split.inside <= kFew;
      if (split.stored < split.inside || (!few && level + 1 == kLevels)) continue;
      const LogitRow inside = stored(level, split);
      if (!goal.by_mass && goal.over == 0.0 && bracket.high == kInfinity) candidates_ = {inside, bracket.low, level};
      goal.over = above;
      goal.weight = split.from_low - split.from_high;
      return few ? pick(level, inside.columns, goal) : search(inside, goal, {range.low, range.high, 0.0}, level + 1);
    }
  }

  std::optional<float> checked(const Goal& goal, float found, double above, double reached) const {
    const bool sure = goal.slack == 0.0 || (above < goal.target - goal.slack && reached >= goal.target + goal.slack);
    return sure ? std::optional<float>(found) : std::nullopt;
  }

  // What search() finds, among `number` logits that are stored at `level`.
  std::optional<float> pick(int level, int64_t number, const Goal& goal) {
    float* first = buffers_[level].get();
    float* last = first + number;
    if (!goal.by_mass) {
      float* kth = first + std::clamp<int64_t>(static_cast<int64_t>(goal.target - goal.over), 1, number) - 1;
      std::nth_element(first, kth, last, std::greater<>());
      return *kth;
    }
    // A heap, because often a handful make up the mass.
    std::make_heap(first, last);
    for (double above = goal.over;;) {
      const float top = *first;
      double reached = above;
      for (; first != last && *first == top; --last) {
        reached += weight_of(scale_, top);
        std::pop_heap(first, last);
      }
      if (reached >= goal.target || first == last) return checked(goal, top, above, reached);
      above = reached;
    }
  }

  template <class Kernel>
  Split pass(const Kernel& kernel, const LogitRow& row, const Bracket& bracket, int level) {
    const int64_t blocks = (row.columns + kBlock - 1) / kBlock, room = kRoom[level] / blocks;
    if (!buffers_[level]) buffers_[level].reset(new float[kRoom[level]]);
    float* out = buffers_[level].get();
    splits_.resize(blocks);
    run_(blocks, [&](int64_t i) { splits_[i] = kernel(row, i, bracket, scale_, out + i * room, room); });
    Split all;
    for (const Split& split : splits_) {
      all.total += split.total;
      all.from_low += split.from_low;
      all.from_high += split.from_high;
      all.inside += split.inside;
      all.stored += split.stored;
    }
    return all;
  }

  // What the last pass, at `level`, stored: side by side from here on.
  LogitRow stored(int level, const Split& all) {
    float* first = buffers_[level].get();
    const int64_t room = kRoom[level] / static_cast<int64_t>(splits_.size());
    int64_t number = 0;
    for (size_t i = 0; i < splits_.size(); ++i) {
      std::memmove(first + number, first + i * room, splits_[i].stored * sizeof(float));
      number += splits_[i].stored;
    }
    return {first, nullptr, nullptr, all.stored, all.stored, DType::kFloat};
  }

  const SelectKernels& kernels_;
  const Run run_;
  Guesser guess_;
  Scale scale_{};
  std::optional<Candidates> candidates_;
  std::unique_ptr<float[]> buffers_[kLevels];
  std::vector<Split> splits_;  // of the last pass, by block
};

}  // namespace specdec
