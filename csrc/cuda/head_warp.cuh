// What the head's kernels are made of: lanes, loads that pass the first cache by, products of matrices.
#pragma once

#include "head.h"

namespace specdec::head {

constexpr unsigned kAll = 0xffffffffu;
constexpr float kInf = __builtin_huge_valf();

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kLanes; }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x) / kLanes; }

struct Bf16;
struct Half;

#ifdef __CUDACC__  // tests/cuda_head_host.cpp has what follows for a host

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the head's kernels need compute capability 8.0 or later: leave older ones out of TORCH_CUDA_ARCH_LIST"
#endif

// 16 bytes that nobody reads again, or zeros. One instruction with a predicate, so that no branch parts neighbours.
__device__ __forceinline__ uint4 load_once(const char* address, bool there) {
  uint4 v = {0, 0, 0, 0};
  asm("{.reg .pred there; setp.ne.b32 there, %5, 0;"
      "@there ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(address), "r"(static_cast<int>(there)));
  return v;
}

// Into the first cache: costs no register until it is read.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

// a b + c for the two numbers in each register, rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma_2(uint32_t a, uint32_t b, uint32_t c);

// sum += a b for a [16, 16], whose rows are hidden vectors, and b [16, 8], whose columns are rows of the weight. Lane
// 4 g + t has of a: columns 2t, 2t + 1 of row g, of row g + 8, then columns 2t + 8, 2t + 9 of both; of b: rows 2t,
// 2t + 1, then 2t + 8, 2t + 9 of column g; of sum: columns 2t, 2t + 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define SPECDEC_HEAD_TYPE(T, NAME)                                                                                     \
  template <>                                                                                                          \
  __device__ __forceinline__ uint32_t fma_2<T>(uint32_t a, uint32_t b, uint32_t c) {                                   \
    uint32_t d;                                                                                                        \
    asm("fma.rn." NAME "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));                                       \
    return d;                                                                                                          \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_add<T>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                         \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                         \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                               \
  }
SPECDEC_HEAD_TYPE(Bf16, "bf16")
SPECDEC_HEAD_TYPE(Half, "f16")
#undef SPECDEC_HEAD_TYPE

#endif

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float from_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// Rounded to nearest, ties to even; a NaN stays one.
__device__ __forceinline__ uint32_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
}

__device__ __forceinline__ int bytes_of(DType type) { return type == DType::kFloat ? 4 : 2; }
__device__ __forceinline__ float load_float(const char* address, DType type) {
  if (type == DType::kFloat) return __ldg(reinterpret_cast<const float*>(address));
  const uint32_t bits = __ldg(reinterpret_cast<const uint16_t*>(address));
  return type == DType::kBf16 ? from_bf16(bits) : from_half(bits);
}

}  // namespace specdec::head
