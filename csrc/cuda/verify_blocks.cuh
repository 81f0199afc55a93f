// Softmax and sums over the block of a row that a warp holds.
#pragma once

#include "verify_logits.cuh"

namespace specdec::device {

// Temperature and filters of one request, of one side.
struct Sampling {
  float temperature, top_k, top_p, min_p;
  float inverse;  // 1 / temperature
  float slope;    // log2(e) / temperature

  static __device__ Sampling of(const Side& side, int64_t request) {
    const float* row = side.params ? side.params + 4 * request : side.common;
    // Of a temperature near 0 the reciprocal overflows; a finite one still makes 0 * slope = 0 at the peak.
    const float inverse = row[0] > 0.0f ? fminf(1.0f / row[0], -kLowest / 2) : 1.0f;
    return {row[0], row[1], row[2], row[3], inverse, inverse * 1.44269504f};
  }
  __device__ bool sampled() const { return temperature > 0.0f; }
  __device__ bool filters() const { return sampled() && (top_k > 0.0f || top_p < 1.0f || min_p > 0.0f); }
};

// A softmax over logits: 2^((x - peak) * slope) * scale.
struct Softmax {
  float peak, slope, scale;

  __device__ Softmax(const Row& row, float slope)
      : peak(row.peak), slope(slope), scale(static_cast<float>(1.0 / row.total)) {}
  __device__ __forceinline__ float of(float x) const { return exp2f((x - peak) * slope) * scale; }
};

// What a pass finds in a block of a row.
struct BlockSum {
  float peak;  // the largest logit, the lowest float if none is finite
  float sum;   // of 2^((x - peak) * slope); NaN if one is NaN or +inf

  // Its part in the sum over a row.
  __device__ double under(float row_peak, float slope) const {
    return sum * exp2((static_cast<double>(peak) - row_peak) * slope);
  }
};

__device__ __forceinline__ BlockSum sum_block(Values& x, float slope) {
  float peak = kLowest, sum = 0.0f;
  each(x, [&](float v, int) { peak = fmaxf(peak, v); });
  peak = warp_max(peak);
  each(x, [&](float v, int) { sum += exp2f((v - peak) * slope); });
  return {peak, warp_sum(sum)};
}

__device__ __forceinline__ double total_of(Values& x) {
  float sum = 0.0f;
  each(x, [&](float v, int) { sum += v; });
  return warp_sum(sum);
}

// Each probability being 2^s at scale 1: the sum of s 2^s.
__device__ __forceinline__ double log_sum(Values& x, float peak, float slope) {
  float sum = 0.0f;
  each(x, [&](float v, int) {
    const float s = (v - peak) * slope;
    if (s > -150.0f) sum += s * exp2f(s);
  });
  return warp_sum(sum);
}

// Sums of min(p / rho, q) and of the part where p / rho is smaller, in fp64: a root is searched on them. `q` is this
// lane's part of a tile.
__device__ __forceinline__ Overlap overlap_of(Values& p, const float* q, double inverse_rho) {
  double both = 0.0, part = 0.0;
  each(p, [&](float v, int at) {
    const double capped = v * inverse_rho, drafted = q[at];
    both += capped < drafted ? capped : drafted;
    part += capped < drafted ? capped : 0.0;
  });
  return {warp_sum(both), warp_sum(part)};
}

__device__ __forceinline__ int first_column_of(Values& x, float logit) {
  int column = kBlock;
  each(x, [&](float v, int at) {
    if (v == logit && at < column) column = at;
  });
  return warp_min(column + lane_offset());
}

// The column at which the running sum of the values exceeds `wanted`; the last positive one where rounding leaves none.
__device__ __forceinline__ int column_at(const Values& x, double wanted) {
  double before = 0.0;
  int last = 0;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    double own = 0.0;
#pragma unroll
    for (int k = 0; k < kWide; ++k) own += x.at[i][k];
    const double upto = before + warp_scan(own);
    const unsigned some = __ballot_sync(kAll, own > 0.0), over = __ballot_sync(kAll, own > 0.0 && upto > wanted);
    double sum = upto - own;
    int column = 0;
    bool here = false;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      if (here || !(x.at[i][k] > 0.0f)) continue;
      sum += x.at[i][k];
      column = column_of(i, k);
      here = over && sum > wanted;
    }
    column = __shfl_sync(kAll, column + lane_offset(), over ? first_lane(over) : some ? last_lane(some) : 0);
    if (some && !found) last = column;
    found = found || over;
    before = __shfl_sync(kAll, upto, kLanes - 1);
  }
  return last;
}

// What a lane holds at some columns of the row becomes `value`; the columns stand in any order, -1 is none.
__device__ __forceinline__ void replace(const int32_t* columns, int count, int64_t block, float value, Values& x) {
  for (int base = 0; base < count; base += kLanes) {
    const int own = base + lane() < count ? columns[base + lane()] : -1;
    unsigned inside = __ballot_sync(kAll, own >= 0 && own / kBlock == block);
    for (; inside; inside &= inside - 1) {
      const int hit = __shfl_sync(kAll, own, first_lane(inside)) % kBlock - lane_offset();
      each(x, [&](float& v, int at) { v = at == hit ? value : v; });
    }
  }
}

// Probabilities of the block's tokens under a trimmed vocabulary: its ids ascend, so those of a block are neighbours.
__device__ __forceinline__ void spread(const LogitRow& row, const Softmax& softmax, int64_t block, float* tile) {
  const int64_t first = block * kBlock;
  __syncwarp();
  for (int i = lane(); i < kBlock; i += kLanes) tile[i] = 0.0f;
  __syncwarp();
  for (int64_t column = lower_bound(row.side.ids, row.side.columns, first) + lane();; column += kLanes) {
    const int64_t at = column < row.side.columns ? __ldg(row.side.ids + column) - first : kBlock;
    const bool inside = at >= 0 && at < kBlock;
    if (inside && at + first < row.side.vocabulary && row.allows(static_cast<int32_t>(at + first)))
      tile[at] = softmax.of(row.logit(column));
    if (!__ballot_sync(kAll, inside)) break;
  }
  __syncwarp();
}

// z of filters: IEEE subtraction and division in fp32, as the reference has it.
__device__ __forceinline__ float z_of(float x, float peak, float temperature) {
  return rounded_difference(x, peak) / temperature;
}

// Bits of a float such that unsigned order is numeric order; -0 is below 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Logits whose keys, ordered(x) >> spare, lie in [low, high] are told apart by (key - low) >> shift < kBins.
struct KeyRange {
  uint32_t low, high;
  int spare, shift;
  double scale;  // sums of exp(z) * scale; 0: counts
};

// Adds what a lane holds to its bins [kBins, kLanes]. In integers, so that no order of summation shows.
__device__ __forceinline__ void add_to_bins(Values& x, const KeyRange& keys, float peak, float temperature,
                                            uint64_t* bins) {
  auto add = [&](float logit, auto measure) {
    const uint32_t key = ordered(logit) >> keys.spare;
    if (logit == -kInf || key < keys.low || key > keys.high) return;
    bins[((key - keys.low) >> keys.shift) * kLanes + lane()] += measure(logit);
  };
  if (keys.scale > 0.0) {
    each_in_turn(x, [&](float& v, int) {  // an exponential in fp64 is long
      add(v, [&](float logit) {
        return static_cast<uint64_t>(exp(static_cast<double>(z_of(logit, peak, temperature))) * keys.scale);
      });
    });
  } else {
    each(x, [&](float& v, int) { add(v, [](float) { return uint64_t{1}; }); });
  }
}

// Leaves the sum of bin b over the lanes in bins[b]: two lanes to a bin, each for half of it, from different banks on.
__device__ __forceinline__ void sum_bins(uint64_t* bins) {
  __syncwarp();
  const int bin = lane() / 2, half = lane() % 2 * (kLanes / 2);
  uint64_t sum = 0;
#pragma unroll 1  // sixteen addresses, none of them worth a register throughout
  for (int j = 0; j < kLanes / 2; ++j) sum += bins[bin * kLanes + half + (bin + j) % (kLanes / 2)];
  sum += __shfl_xor_sync(kAll, sum, 1);
  __syncwarp();
  if (half == 0) bins[bin] = sum;
}

}  // namespace specdec::device
