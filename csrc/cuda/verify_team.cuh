// Threads that work on one request: a team of thread blocks. In each, one warp walks, one warp serves it, and the
// others read rows for the server.
#pragma once

#include "verify.h"

namespace specdec::device {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kLanes; }

// Warps of a thread block: readers first, then the server, then the walker.
__device__ __forceinline__ int readers() { return static_cast<int>(blockDim.x) / kLanes - 2; }

// Barriers of the walker and the server, and of the server and the readers.
__device__ __forceinline__ void sync_walk() { __barrier_sync_count(1, 2 * kLanes); }
__device__ __forceinline__ void sync_rows() { __barrier_sync_count(2, (readers() + 1) * kLanes); }

__device__ __forceinline__ float warp_max(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

__device__ __forceinline__ int warp_min(int x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kAll, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Every lane gets the same bits: each step adds the same two numbers on both sides.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Sum over this lane and those below it.
__device__ __forceinline__ double warp_scan(double x) {
  for (int step = 1; step < kLanes; step *= 2) {
    const double below = __shfl_up_sync(kAll, x, step);
    if (lane() >= step) x += below;
  }
  return x;
}

__device__ __forceinline__ int first_lane(unsigned lanes) { return __ffs(static_cast<int>(lanes)) - 1; }
__device__ __forceinline__ int last_lane(unsigned lanes) { return kLanes - 1 - __clz(static_cast<int>(lanes)); }

// The first of `n` ascending ids that is not below `id`, by the whole warp: three or four steps instead of seventeen
// that wait for one load each. Ends and stays in bounds for ids in any order.
__device__ inline int64_t lower_bound(const int32_t* ids, int64_t n, int64_t id) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t step = (high - low + kLanes - 1) / kLanes, probe = low + lane() * step;
    const bool below = probe < high && __ldg(ids + probe) < id;
    const int count = __popc(__ballot_sync(kAll, below));
    if (count == 0) return low;
    const int64_t next = low + count * step;
    low += (count - 1) * step + 1;
    if (next < high) high = next;
  }
  return low;
}

// One lane writes what other threads read: before, none of this warp may still read what was there; after, all may.
template <typename Write>
__device__ __forceinline__ void by_one_lane(Write write) {
  __syncwarp();
  if (lane() == 0) write();
  __syncwarp();
}

// The thread blocks of one request, as their servers see it.
struct Team {
  int rank, size;      // of this thread block; thread blocks
  uint32_t* arrivals;  // of the team, zero when the kernel starts
  uint32_t expected = 0;

  // Waits for the servers of all thread blocks; what was written before a server came here can be read by all of them.
  //
  // Through a counter in global memory and not through a thread block cluster: clusters begin with sm_90 and end at
  // 8 or 16 thread blocks, whereas one request alone wants a fourth of the device. Every thread block of the launch is
  // resident, since a launch with teams is cooperative, so none waits for one that cannot start. The counter only
  // grows, so nothing has to be reset between barriers.
  __device__ void sync() {
    __syncwarp();
    if (size == 1) return;
    expected += size;
    if (lane() == 0) {
      ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> counter(*arrivals);
      counter.fetch_add(1, ::cuda::memory_order_acq_rel);
      while (counter.load(::cuda::memory_order_acquire) < expected) {
      }
    }
    __syncwarp();
  }
};

}  // namespace specdec::device
