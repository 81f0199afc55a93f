// The second kernel: a warp for each request merges what the thread blocks of its team found.
#pragma once

#include "head_best.cuh"

namespace specdec::head {

// By a whole warp. `shared`: merge_bytes(launch), aligned to 16.
__device__ __forceinline__ void merge(const Launch& launch, int request, char* shared) {
  const unsigned begins = beginnings(launch);
  const int run = __popc(begins & (kAll >> (kLanes - 1 - request))) - 1, team = team_of(launch, run, __popc(begins));

  Sums sums = no_sums();
  for (int i = lane(); i < team; i += kLanes)
    sums = merged(sums, launch.found_sums[static_cast<int64_t>(request) * launch.blocks + i]);
  sums = merged_over_lanes(sums);
  const bool broken = sums.sum != sums.sum;

  const int capacity = launch.capacity(), k = launch.k;
  const List list = {reinterpret_cast<double*>(shared), reinterpret_cast<float*>(shared + 8 * capacity),
                     reinterpret_cast<int32_t*>(shared + 12 * capacity)};
  int count = 0;
  double last = -__builtin_huge_val();
  // The best of all thread blocks, then the second best of all, ..: where none of them matters, no later one does.
  for (int depth = 0; depth < k && !broken; ++depth) {
    const int64_t from = (static_cast<int64_t>(request) * k + depth) * launch.blocks;
    bool any = false;
    for (int base = 0; base < team; base += kLanes) {
      const int i = base + lane();
      const double key = i < team ? launch.found_keys[from + i] : -__builtin_huge_val();
      const bool hopeful = key > -__builtin_huge_val() && key >= last;
      const unsigned all = __ballot_sync(kAll, hopeful);
      if (all == 0) continue;
      any = true;
      if (count > capacity - kLanes) {
        count = list.cut(count, k);
        last = list.keys[k - 1];
      }
      const int at = count + __popc(all & ((1u << lane()) - 1));
      if (hopeful) list.set(at, key, launch.found_logits[from + i], launch.found_ids[from + i]);
      count += __popc(all);
      __syncwarp();
    }
    if (!any) break;
  }
  count = list.cut(count, k);

  const int64_t to = static_cast<int64_t>(request) * k;
  for (int i = lane(); i < k; i += kLanes) {
    launch.out_logits[to + i] = i < count ? list.logits[i] : -kInf;
    launch.out_tokens[to + i] = i < count ? list.ids[i] : -1;
    if (launch.out_keys != nullptr) launch.out_keys[to + i] = i < count ? list.keys[i] : -__builtin_huge_val();
  }
  if (lane() != 0) return;
  if (launch.out_sums != nullptr) {
    constexpr double kNan = __builtin_nan("");
    launch.out_sums[request] = broken ? Sums{kNan, kNan, kNan} : sums;
  } else {
    constexpr double kLn2 = 0.69314718055994530942;
    const bool nothing = sums.sum == 0.0;
    launch.out_lse[request] = nothing ? -kInf : static_cast<float>(sums.anchor * kLn2 + log(sums.sum));
    launch.out_entropy[request] = nothing ? 0.0f : static_cast<float>(log(sums.sum) - kLn2 * sums.weighted / sums.sum);
  }
}

}  // namespace specdec::head
