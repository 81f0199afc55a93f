// CUDA's threads on a host, so that device code runs where there is no GPU: every CUDA thread is a fiber of its own and
// all of them take turns on one operating system thread. What a GPU promises is all that holds here: a fiber runs until
// it waits for others, warps and thread blocks meet where the code makes them meet and nowhere else. Built with
// -fsanitize=thread, fibers count as threads, barriers and atomics as the only order between them.
//
// Include it before the device code, which it gives the names that nvcc has built in.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace cuda_host {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// As a device allocates it; a byte behind its end is nobody's. Until somebody writes it, every byte is `poison`.
inline Memory allocate(int64_t bytes, int poison) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) std::abort();
  std::memset(memory, poison, static_cast<size_t>(bytes));
  return Memory(static_cast<char*>(memory));
}

struct Index {
  unsigned x;
};

// Of the fiber that runs.
Index thread_index();
Index block_size();
unsigned lane();

// Waits until `count` threads of the thread block have come to its barrier `id`.
void barrier(unsigned id, unsigned count);

// Meets the other lanes of the warp, which must do the same kind of thing. Returns what each of them brought.
enum class Meeting { kShuffle, kBallot, kSync };
const uint64_t* meet(Meeting kind, uint64_t value);

// Lets others run, where a thread waits for memory to change.
void yield();

// Runs body(argument, block) as `threads` threads in each of `blocks` thread blocks. Null, or what went wrong: threads
// that wait for each other in vain, lanes of a warp that disagree.
const char* run(int blocks, int threads, void (*body)(void*, int), void* argument);

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T of_lane(const uint64_t* values, unsigned lane) {
  T value;
  std::memcpy(&value, &values[lane], sizeof(T));
  return value;
}

}  // namespace cuda_host

#define __device__
#define __forceinline__ inline
#define __noinline__
#define threadIdx (cuda_host::thread_index())
#define blockDim (cuda_host::block_size())

struct uint4 {
  uint32_t x, y, z, w;
};

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_host::of_lane<T>(cuda_host::meet(cuda_host::Meeting::kShuffle, cuda_host::to_bits(value)), lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(cuda_host::lane()) ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = static_cast<int>(cuda_host::lane());
  return __shfl_sync(mask, value, lane >= step ? lane - step : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int step) {
  const int lane = static_cast<int>(cuda_host::lane());
  return __shfl_sync(mask, value, lane + step < 32 ? lane + step : lane);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* values = cuda_host::meet(cuda_host::Meeting::kBallot, value);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(values[i]) << i;
  return bits;
}
inline void __syncwarp() { cuda_host::meet(cuda_host::Meeting::kSync, 0); }
inline void __syncthreads() { cuda_host::barrier(0, blockDim.x); }
inline void __barrier_sync_count(unsigned id, unsigned count) { cuda_host::barrier(id, count); }

inline int atomicMax(int* address, int value) {
  std::atomic_ref<int> target(*address);
  int seen = target.load();
  while (seen < value && !target.compare_exchange_weak(seen, value)) {
  }
  return seen;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned short __ushort_as_half(unsigned short bits) { return bits; }
inline float __half2float(unsigned short half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return half >> 15 ? -value : value;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace cuda {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
enum thread_scope { thread_scope_device };

template <typename T, thread_scope>
struct atomic_ref : std::atomic_ref<T> {
  using std::atomic_ref<T>::atomic_ref;
  T load(std::memory_order order) const {
    cuda_host::yield();
    return std::atomic_ref<T>::load(order);
  }
};

}  // namespace cuda
