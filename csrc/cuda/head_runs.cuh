// Who shares rows: a run is neighbouring requests that look at one list of rows, and a team the thread blocks that work
// on a run. Both follow from row_groups, which only the device can read.
#pragma once

#include "head_warp.cuh"

namespace specdec::head {

// What a thread block works on. It lies in shared memory: registers are short while the weight is read.
struct Run {
  int first, size;      // requests
  int rank;             // of the thread block in its team
  int begin, end;       // its rows, as indices into the list
  const int32_t* rows;  // the list; null: all rows in order
  bool lost;            // there is no such list
};
static_assert(sizeof(Run) <= kRunBytes, "head.h leaves that much room");

// Requests that begin a run, as bits. By a whole warp.
__device__ __forceinline__ unsigned beginnings(const Launch& launch) {
  const int b = lane();
  int list = 0;
  if (launch.row_groups != nullptr)
    list = b < launch.batch ? __ldg(launch.row_groups + b) : 0;
  else if (launch.lists > 1)
    list = b;
  const int before = __shfl_up_sync(kAll, list, 1);
  const unsigned changes = __ballot_sync(kAll, b == 0 || list != before);
  const unsigned up_to = kAll >> (kLanes - 1 - b);
  const int changed = kLanes - 1 - __clz(static_cast<int>(changes & up_to));
  return __ballot_sync(kAll, b < launch.batch && (b - changed) % launch.columns == 0);
}

// Thread blocks take turns with the runs.
__device__ __forceinline__ int team_of(const Launch& launch, int run, int runs) {
  return (launch.blocks - run + runs - 1) / runs;
}

// By a whole warp.
__device__ __forceinline__ Run find_run(const Launch& launch, int thread_block) {
  unsigned begins = beginnings(launch);
  const int runs = __popc(begins), index = thread_block % runs, team = team_of(launch, index, runs);
  for (int i = 0; i < index; ++i) begins &= begins - 1;
  Run run;
  run.first = __ffs(static_cast<int>(begins)) - 1;
  begins &= begins - 1;
  run.size = (begins != 0 ? __ffs(static_cast<int>(begins)) - 1 : launch.batch) - run.first;
  run.rank = thread_block / runs;
  run.begin = static_cast<int>(static_cast<int64_t>(launch.count) * run.rank / team);
  run.end = static_cast<int>(static_cast<int64_t>(launch.count) * (run.rank + 1) / team);
  int list = launch.lists > 1 ? run.first : 0;
  if (launch.row_groups != nullptr) list = __ldg(launch.row_groups + run.first);
  run.lost = launch.lists >= 0 && (list < 0 || list >= launch.lists);
  run.rows = launch.lists < 0 || run.lost ? nullptr : launch.rows + list * launch.rows_stride;
  return run;
}

// The row of the weight that stands at `index` of the list, -1 where the weight has none.
__device__ __forceinline__ int row_at(const Launch& launch, const Run& run, int index) {
  const int row = run.rows != nullptr ? __ldg(run.rows + index) : index;
  return run.lost || row < 0 || row >= launch.height ? -1 : row;
}

}  // namespace specdec::head
