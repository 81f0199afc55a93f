// Where the nodes of one tree stand, found by one thread block. Written for any number of threads and nodes, and free
// of CUDA's headers, so that it also runs where there is no GPU (tests/cuda_host.h).
#pragma once

#include "specdec/layout.h"

namespace specdec::layout {

// What the threads of a block share.
struct Shared {
  int32_t start;
};

// The largest start up to `tree`: cu_nodes that do not ascend give no node to two trees. All threads call it.
__device__ __forceinline__ int64_t ascending_start(const Launch& launch, int64_t tree, Shared& shared) {
  if (threadIdx.x == 0) shared.start = 0;
  __syncthreads();
  int64_t start = 0;
  for (int64_t t = threadIdx.x; t <= tree; t += blockDim.x) {
    const int64_t here = start_of(launch, t);
    start = here > start ? here : start;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(~0u, start, lanes);
    start = other > start ? other : start;
  }
  if (threadIdx.x % 32 == 0) atomicMax(&shared.start, static_cast<int32_t>(start));
  __syncthreads();
  return shared.start;
}

__device__ __forceinline__ void clear_rows(const Launch& launch, int64_t first, int64_t last) {
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) clear(launch, row);
}

// Tree `launch.batch` is what lies behind the last one.
//
// Nodes of a word: 64 neighbours, whose bits stand in one word of a row. First every node gathers its ancestors among
// the nodes of its own word, at most 63 steps. Then it goes from word to word: the topmost ancestor in a word hangs on
// a node of a lower word, and that node has gathered its own word already. So a chain of 1024 nodes takes 64 + 16 steps
// instead of 1024, and nothing is kept but the outputs.
__device__ __forceinline__ void lay_out(const Launch& launch, int64_t tree, Shared& shared) {
  const int64_t first = ascending_start(launch, tree, shared);
  if (tree == 0) clear_rows(launch, 0, first);
  if (tree == launch.batch) return clear_rows(launch, first, launch.nodes);
  const int64_t next = start_of(launch, tree + 1), size = next > first ? next - first : 0;
  const int64_t count = within_bounds(launch, size);
  int64_t* const bits = launch.bits + first * launch.words;
  clear_rows(launch, first + count, first + size);

  for (int64_t node = threadIdx.x; node < count; node += blockDim.x) {
    const int64_t word = node / 64;
    uint64_t own = 0;
    for (int64_t up = node; up >= word * 64; up = parent_of(launch, first, up)) own |= uint64_t{1} << (up % 64);
    bits[node * launch.words + word] = static_cast<int64_t>(own);
  }
  __syncthreads();
  for (int64_t node = threadIdx.x; node < count; node += blockDim.x) {
    int64_t* const row = bits + node * launch.words;
    int64_t word = node / 64;
    for (int64_t above = word + 1; above < launch.words; ++above) row[above] = 0;
    uint64_t seen = static_cast<uint64_t>(row[word]);
    int32_t depth = -1;
    while (true) {
      depth += __popcll(seen);
      const int64_t up = parent_of(launch, first, word * 64 + __ffsll(static_cast<long long>(seen)) - 1);
      const int64_t lower = up < 0 ? -1 : up / 64;
      while (--word > lower) row[word] = 0;
      if (lower < 0) break;
      seen = static_cast<uint64_t>(bits[up * launch.words + lower]);
      row[lower] = static_cast<int64_t>(seen);
    }
    place(launch, tree, first + node, depth);
  }
}

}  // namespace specdec::layout
