// What is kept of logits: sums for log-sum-exp and entropy, and the k best of each request.
#pragma once

#include "head_runs.cuh"
#include "specdec/philox.h"

namespace specdec::head {

__device__ __forceinline__ Sums no_sums() { return {-__builtin_huge_val(), 0.0, 0.0}; }

// 2^n for whole n <= 0, 0 where that is no normal number.
__device__ __forceinline__ double power_of_two(double n) {
  return n < -1022.0 ? 0.0 : __longlong_as_double(static_cast<long long>(1023.0 + n) << 52);
}

// To another anchor, not below the last.
__device__ __forceinline__ void move(Sums& s, double anchor) {
  if (s.anchor == anchor) return;
  if (s.sum != 0.0) {  // NaN as well
    const double factor = power_of_two(s.anchor - anchor);
    s.weighted = factor == 0.0 ? 0.0 : factor * (s.weighted + (s.anchor - anchor) * s.sum);
    s.sum = s.sum != s.sum ? s.sum : factor * s.sum;
  }
  s.anchor = anchor;
}

// One term. The fraction's power is fp32; the whole part shifts it without an error, so a term is the same whoever adds
// it. Logits that broke a request stay in the sum as NaN.
__device__ __forceinline__ void add(Sums& s, float logit, double slope) {
  if (!(logit < kInf)) s.sum = __builtin_nan("");
  const double t = logit * slope;
  if (!(t > -__builtin_huge_val() && t < __builtin_huge_val())) return;
  const double whole = floor(t);
  if (whole > s.anchor) move(s, whole);
  const double factor = power_of_two(whole - s.anchor);
  if (factor == 0.0) return;
  const double term = factor * exp2f(static_cast<float>(t - whole));
  s.sum += term;
  s.weighted += term * (t - s.anchor);
}

__device__ __forceinline__ Sums merged(Sums a, Sums b) {
  const double anchor = a.anchor > b.anchor ? a.anchor : b.anchor;
  move(a, anchor);
  move(b, anchor);
  return {anchor, a.sum + b.sum, a.weighted + b.weighted};
}

__device__ __forceinline__ Sums merged_over_lanes(Sums s) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Sums other = {__shfl_xor_sync(kAll, s.anchor, step), __shfl_xor_sync(kAll, s.sum, step),
                        __shfl_xor_sync(kAll, s.weighted, step)};
    s = merged(s, other);
  }
  return s;
}

// A request's list of candidates in shared memory: the k best so far in order, then others. Keys are fp64: near
// temperature 0 an fp32 quotient would be too coarse for the noise that is added to it.
struct List {
  double* keys;
  float* logits;
  int32_t* ids;

  __device__ __forceinline__ static List of(char* shared, const Launch& launch, int v) {
    const int64_t at = static_cast<int64_t>(v) * launch.capacity();
    return {reinterpret_cast<double*>(shared + launch.shared.keys) + at,
            reinterpret_cast<float*>(shared + launch.shared.logits) + at,
            reinterpret_cast<int32_t*>(shared + launch.shared.ids) + at};
  }

  __device__ __forceinline__ void set(int at, double key, float logit, int32_t id) const {
    keys[at] = key;
    logits[at] = logit;
    ids[at] = id;
  }

  // By a whole warp: sorts `count` entries and keeps k. Each entry goes where its rank says, which is how many come
  // before it. Equal keys go by id, equal ids by place.
  __device__ __forceinline__ int cut(int count, int k) const {
    constexpr int kMine = 4;
    double key[kMine];
    int32_t id[kMine];
    int rank[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int at = lane() + i * kLanes;
      key[i] = at < count ? keys[at] : 0.0;
      id[i] = at < count ? ids[at] : 0;
      rank[i] = at < count ? 0 : k;
    }
    for (int j = 0; j < count; ++j) {
      const double other = keys[j];
      const int32_t name = ids[j];
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        rank[i] += other > key[i] || (other == key[i] && (name < id[i] || (name == id[i] && j < lane() + i * kLanes)));
    }
    float logit[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) logit[i] = rank[i] < k ? logits[lane() + i * kLanes] : 0.0f;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (rank[i] < k) set(rank[i], key[i], logit[i], id[i]);
    __syncwarp();
    return count < k ? count : k;
  }
};

// What an fp32 key must reach to matter beside the k best: less than the last of them by more than its own rounding.
__device__ __forceinline__ float reach_of(double key) {
  return static_cast<float>(key - fabs(key) * 0x1p-20 - 0x1p-20);
}

// Noise is -log(-log(1 - v)) with v >= 2^-33, at most 33 ln 2 < 22.8739; two logarithms add less than 1e-5.
constexpr float kMostNoise = 22.875f;

// How the logits of a request become keys and terms.
__device__ __forceinline__ State state_of(const Launch& launch, int request) {
  constexpr double kLog2E = 1.4426950408889634074;
  const float given = launch.temperatures != nullptr ? __ldg(launch.temperatures + request) : launch.temperature;
  State s = {0.0f, -kInf, kLog2E / (given > 0.0f ? static_cast<double>(given) : 1.0), -__builtin_huge_val(), 0, 0,
             0,    0};
  if (launch.seed != nullptr && given > 0.0f) {
    s.temperature = given;
    s.seed = static_cast<uint64_t>(__ldg(launch.seed + request));
    s.offset = static_cast<uint64_t>(__ldg(launch.offset + request));
    s.row = launch.row != nullptr ? static_cast<uint32_t>(__ldg(launch.row + request)) : 0;
  }
  return s;
}

// No key of this logit is larger: noise is bounded, so most logits need none.
__device__ __forceinline__ float most_of(const State& s, float logit) {
  return s.temperature > 0.0f ? logit / s.temperature + kMostNoise : logit;
}

__device__ __forceinline__ double key_of(const State& s, float logit, int32_t id) {
  if (!(s.temperature > 0.0f)) return logit;
  const uint32_t word = philox_word(s.seed, s.offset, kDraftStream, s.row, static_cast<uint32_t>(id));
  const float noise = -logf(-log1pf(-gumbel_argument(word)));
  return static_cast<double>(logit) / static_cast<double>(s.temperature) + static_cast<double>(noise);
}

}  // namespace specdec::head
