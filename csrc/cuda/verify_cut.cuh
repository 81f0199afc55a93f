// Filters: the smallest logit that top_k, top_p and min_p leave, by threshold selection on the bits of the logits.
//
// The kept set is that of sorting (specdec_kernels/reference/rows.py): thresholds are values of z = (x - peak) / T, and
// ties in z stay. z never falls as x grows, so the set is all x from some cut on. A pass over the row divides a range
// of keys, the logits' bits in numeric order, into kBins and sums what falls into each: counts for top_k, probabilities
// for top_p. What is kept is the bin in which the sum from the top reaches its goal: four bits of the keys are settled
// in a pass, the 16 bits of bf16 in four.
#pragma once

#include "verify_readers.cuh"

namespace specdec::device {

// The cut of one row. `Sum` takes a KeyRange and returns what falls into bin lane(), 0 from kBins on.
template <typename Sum>
class CutFinder {
 public:
  __device__ CutFinder(const Side& side, const Sampling& sampling, float peak, Sum sum)
      : sampling_(sampling),
        peak_(peak),
        sum_(sum),
        // Of logits with fewer bits than fp32 the last ones are the same in all keys.
        spare_(side.mixed || side.type == DType::kFloat ? 0
               : side.type == DType::kBf16              ? 16
                                                        : 13) {}

  // `total`: about the sum of exp(z) over the row.
  __device__ float find(double total) const {
    float cut = -kInf;
    uint32_t low = 0;
#pragma unroll 1
    for (int filter = 0; filter < 3; ++filter) {
      float z;
      if (filter == 2) {
        if (!(sampling_.min_p > 0.0f)) break;
        z = at_least(log(static_cast<double>(sampling_.min_p)));
      } else {
        const bool counts = filter == 0;
        if (counts ? !(sampling_.top_k > 0.0f) : !(sampling_.top_p < 1.0f)) continue;
        const double goal = counts ? static_cast<double>(static_cast<int64_t>(sampling_.top_k)) : sampling_.top_p;
        uint32_t key;
        if (!select(goal, counts ? 0.0 : 0x1p62 / total, low, &key)) continue;
        z = z_of(from_ordered(expand(key)), peak_, sampling_.temperature);
      }
      cut = fmaxf(cut, lowest_with(z));
      low = smallest_key(cut);
    }
    return cut;
  }

 private:
  static __device__ float at_least(double x) {
    const float nearest = static_cast<float>(x);
    return static_cast<double>(nearest) < x ? from_ordered(ordered(nearest) + 1) : nearest;
  }

  __device__ uint32_t expand(uint32_t key) const {
    const uint32_t full = key << spare_;
    return full >> 31 ? full : full | ((1u << spare_) - 1);
  }

  // The key of the smallest logit of the row's type that is not below x.
  __device__ uint32_t smallest_key(float x) const {
    const uint32_t full = ordered(x);
    return (full >> 31 ? full + ((1u << spare_) - 1) : full) >> spare_;
  }

  // The smallest x whose z is not below `z`: distinct x may share a z.
  __device__ float lowest_with(float z) const {
    uint32_t low = ordered(-kInf), high = ordered(peak_);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (z_of(from_ordered(middle), peak_, sampling_.temperature) >= z)
        high = middle;
      else
        low = middle + 1;
    }
    return from_ordered(low);
  }

  // The largest key such that what has it or a larger one, from the key `low` on, reaches the goal: a count where
  // `scale` is 0, else a share of all. False if nothing does.
  __device__ bool select(double goal, double scale, uint32_t low, uint32_t* key) const {
    uint32_t high = ordered(peak_) >> spare_;
    uint64_t above = 0;
    bool is_share = scale > 0.0;
    for (;;) {
      const int width = kLanes - __clz(static_cast<int>(high - low)), shift = width > 4 ? width - 4 : 0;
      uint64_t from_here = sum_(KeyRange{low, high, spare_, shift, scale});
      for (int step = 1; step < kBins; step *= 2) {
        const uint64_t upper = __shfl_down_sync(kAll, from_here, step);
        if (lane() + step < kBins) from_here += upper;
      }
      if (is_share) goal *= static_cast<double>(__shfl_sync(kAll, from_here, 0));
      is_share = false;
      // A bin without anything in it is not where a goal of 0 is reached.
      const bool reaches = lane() < kBins && from_here > 0 && static_cast<double>(above + from_here) >= goal;
      const unsigned reached = __ballot_sync(kAll, reaches);
      if (reached == 0) return false;
      const int bin = last_lane(reached);
      above += __shfl_sync(kAll, from_here, bin + 1);  // 0 behind the last bin
      low += static_cast<uint32_t>(bin) << shift;
      if (shift == 0) {
        *key = low;
        return true;
      }
      const uint32_t last = low + ((1u << shift) - 1);
      high = last < high ? last : high;
    }
  }

  const Sampling sampling_;
  const float peak_;
  const Sum sum_;
  const int spare_;
};

}  // namespace specdec::device
