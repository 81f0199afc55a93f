// The first kernel: a thread block goes over its rows, a tile at a time, and writes what it found.
#pragma once

#include "head_keeper.cuh"
#include "head_loader.cuh"

namespace specdec::head {

// One thread's part. `shared`: launch.shared.end bytes, aligned to 16.
template <class F>
__device__ __forceinline__ void scan(const Launch& launch, int thread_block, char* shared) {
  Run& run = *reinterpret_cast<Run*>(shared + launch.shared.run);
  if (warp() == 0) {
    const Run found = find_run(launch, thread_block);
    if (lane() == 0) run = found;
  }
  __syncthreads();
  Loader<F> loader(launch, run, shared);
  const Keeper keeper(launch, run, shared);
  loader.start();
  keeper.start();
  // The facts of a tile's rows; a thread has a row.
  auto look_up = [&](int start) { return keeper.look_up(start + static_cast<int>(threadIdx.x)); };
  auto put = [&](const Fact& fact, int tile) {
    if (static_cast<int>(threadIdx.x) < launch.tile_rows()) keeper.fact(tile, static_cast<int>(threadIdx.x)) = fact;
  };
  put(look_up(run.begin), 0);
  pack_hidden<F>(launch, run, shared);
  __syncthreads();
  int tile = 0;
  for (int start = run.begin; start < run.end; start += launch.tile_rows(), ++tile) {
    loader.multiply(tile, start);
    __syncthreads();
    const Fact next = look_up(start + launch.tile_rows());  // under way while this tile is taken
    keeper.take(tile, start, run.end - start < launch.tile_rows() ? run.end : start + launch.tile_rows());
    put(next, tile + 1);
  }
  keeper.finish();
}

}  // namespace specdec::head
