// Where the search of cut.h looks next: a bracket around the logit it is after, from a sample of the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "select.h"

namespace specdec {

// Floats numbered in their order; 0 and -0 are one.
inline int64_t number_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >= 0 ? int64_t{bits} : -int64_t{bits & 0x7FFFFFFF};
}

inline float float_of(int64_t number) {
  const uint32_t bits = number >= 0 ? static_cast<uint32_t>(number) : 0x80000000u | static_cast<uint32_t>(-number);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float z_of(const Scale& scale, float x) { return (x - scale.peak) / scale.temperature; }
inline double weight_of(const Scale& scale, float x) { return std::exp(static_cast<double>(z_of(scale, x))); }

// Ascending, byte by byte: what a sort by comparisons spends on some hundred floats is mostly mispredicted branches.
class FloatSorter {
 public:
  void operator()(std::vector<float>* values) {
    const size_t number = values->size();
    keys_.resize(2 * number);
    uint32_t *from = keys_.data(), *to = from + number;
    uint32_t starts[4][256] = {};
    for (size_t i = 0; i < number; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &(*values)[i], sizeof bits);
      from[i] = bits ^ (bits >> 31 ? ~0u : 0x80000000u);
      for (int byte = 0; byte < 4; ++byte) ++starts[byte][from[i] >> 8 * byte & 255];
    }
    for (int byte = 0; byte < 4; ++byte) {
      uint32_t start = 0;
      for (uint32_t& count : starts[byte]) start += std::exchange(count, start);
      for (size_t i = 0; i < number; ++i) to[starts[byte][from[i] >> 8 * byte & 255]++] = from[i];
      std::swap(from, to);
    }
    for (size_t i = 0; i < number; ++i) {
      const uint32_t bits = from[i] ^ (from[i] >> 31 ? 0x80000000u : ~0u);
      std::memcpy(&(*values)[i], &bits, sizeof bits);
    }
  }

 private:
  std::vector<uint32_t> keys_;
};

// The largest logit from which on a row, with what lies over it, weighs `target`.
struct Goal {
  bool by_mass;   // e^z, else every logit weighs 1
  double weight;  // of the row
  double target = 0.0;
  double over = 0.0;   // weight of what was above the row when it was stored
  double slack = 0.0;  // target is known to within this much
  double share = 0.0;  // above 0: weight is a guess as yet, and target is this share of it
};

// It is in [low, high).
struct Range {
  float low = std::numeric_limits<float>::lowest(), high = std::numeric_limits<float>::infinity();
  std::optional<double> below;  // weight of the row's x < low, once it is known
};

struct Guess {
  Bracket bracket;
  double from_low;  // about how many logits are not below bracket.low
  double below;     // and how much the others weigh
};

// Shorter rows are not worth a guess.
constexpr int64_t kFew = 512;

class Guesser {
 public:
  explicit Guesser(const SelectKernels& kernels) : kernels_(kernels) {}

  // A bracket inside a range, by the part of a sample that is in it; where that part cannot tell more than the range,
  // just the likeliest logit, which may be tied with many. After some rounds, whatever the row is like, the middle
  // third of the floats in the range: then no search takes more than some twenty rounds.
  Guess operator()(const LogitRow& row, const Scale& scale, const Goal& goal, const Range& range, int round) {
    Guess guess{{range.low, range.high}, static_cast<double>(row.columns), 0.0};
    if (row.columns <= kFew) return guess;
    if (round < kSampledRounds) {
      draw(row, range, kFirstSample << round);
      const std::optional<float> likeliest = narrow(row, scale, goal, range, &guess);
      if (round == 0 || guess.bracket.low > range.low || guess.bracket.high < range.high) return guess;
      if (likeliest) {
        guess.bracket = {*likeliest, float_of(number_of(*likeliest) + 1)};
        return guess;
      }
    }
    const int64_t low = number_of(range.low), third = (number_of(range.high) - low) / 3;
    guess.bracket = {float_of(low + third), float_of(low + std::max<int64_t>(1, 2 * third))};
    return guess;
  }

 private:
  static constexpr int kSampledRounds = 3;
  static constexpr int64_t kFirstSample = 512;

  // Only what may be of use is sorted.
  void draw(const LogitRow& row, const Range& range, int64_t size) {
    const int64_t stride = std::max<int64_t>(32, row.columns * kClusterSize / size / 32 * 32);
    sample_.resize((row.columns / stride + 1) * kClusterSize + 16);
    drawn_ = kernels_.sample(row, stride, sample_.data());
    const float low = range.below ? range.low : -std::numeric_limits<float>::infinity();
    const auto unused = [&](float x) { return x < low || x >= range.high; };
    sample_.erase(std::remove_if(sample_.begin(), sample_.begin() + drawn_, unused), sample_.end());
    sort_(&sample_);
  }

  // Adds up from the lightest logit, because a sample knows little of the few that are heavy. Returns the logit of the
  // sample at which the sum comes closest to what is wanted.
  std::optional<float> narrow(const LogitRow& row, const Scale& scale, const Goal& goal, const Range& range,
                              Guess* guess) {
    constexpr double kSpread = 3.0;  // standard deviations of a sum
    const auto number = static_cast<double>(drawn_);
    const double each = static_cast<double>(row.columns) / number;  // so many logits stand behind one of the sample
    weights_.resize(sample_.size());
    double all = 0.0;
    for (size_t i = 0; i < sample_.size(); ++i) all += weights_[i] = goal.by_mass ? weight_of(scale, sample_[i]) : 1.0;
    const double weight = goal.share > 0.0 ? std::max(goal.weight, all * each) : goal.weight;
    // What lies below the logit that is looked for.
    const double wanted = weight + goal.over - (goal.share > 0.0 ? goal.share * weight : goal.target);
    const double base = range.below.value_or(0.0);
    double sum = 0.0, squares = 0.0;
    std::optional<float> likeliest;
    for (size_t i = 0; i < sample_.size(); ++i) {
      const float x = sample_[i];
      if (x >= range.low && (!likeliest || base + each * sum <= wanted)) likeliest = x;
      const double spread = kSpread * std::sqrt(std::max(0.0, squares - sum * sum / number)) + 2.0 * weights_[i];
      if (base + each * (sum + spread) <= wanted && x > guess->bracket.low)
        *guess = {{x, range.high}, each * static_cast<double>(sample_.size() - i), base + each * sum};
      if (base + each * (sum - spread) >= wanted && x > range.low) {
        guess->bracket.high = std::max(x, float_of(number_of(guess->bracket.low) + 1));
        break;
      }
      sum += weights_[i];
      squares += weights_[i] * weights_[i];
    }
    return likeliest;
  }

  const SelectKernels& kernels_;
  FloatSorter sort_;
  int64_t drawn_ = 0;
  std::vector<float> sample_;  // of the columns drawn
  std::vector<double> weights_;
};

}  // namespace specdec
