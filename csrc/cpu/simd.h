// The vector vocabulary of the kernel files: kWidth fp32 lanes, the widest that the tier has. For tier files only.
//
//   Vec, Ints, Mask     fp32 lanes, 32-bit lanes, one truth value per lane
//   load, store         from fp32, bf16 or fp16 / to fp32; with a count n <= kWidth: the first n lanes, the rest `fill`
//   add sub mul div     fma(a, b, c) = a * b + c, one rounding where the tier has it (scalar has not)
//   max, min            return b where either is NaN, so max(limit, x) keeps a NaN and max(x, limit) drops it
//   gt ge eq            false where either is NaN; not_lt(a, b) is true there
//   select(m, a, b)     m ? a : b
//   bits(m), any(m)     bit i is lane i
//   compress            stores the lanes of m side by side, and whatever up to kWidth lanes in all; how many m has
//   to_floats(_unsigned)  rounds to nearest, once
//   reduce_add          in one fixed order, pairwise
//
// simd_math.h adds exp, log, Philox and Gumbel noise, simd_double.h what is summed in fp64.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#define SPECDEC_INLINE static inline __attribute__((always_inline))

#if defined(SPECDEC_TIER_AVX2)
#include "simd_avx2.h"
#elif defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
#include "simd_avx512.h"
#else
#include "simd_scalar.h"
#endif

namespace specdec::SPECDEC_TIER {

constexpr float kInf = __builtin_inff();

// Calls f with a null pointer of the type that a dtype names, so that a type known at run time is looked at once.
template <typename F>
SPECDEC_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<const float*>(nullptr));
    case DType::kBf16:
      return f(static_cast<const Bf16*>(nullptr));
    case DType::kHalf:
      return f(static_cast<const Half*>(nullptr));
  }
}

}  // namespace specdec::SPECDEC_TIER
