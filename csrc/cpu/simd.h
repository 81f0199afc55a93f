// The vector vocabulary of the kernel files: kWidth fp32 lanes, the widest that the tier has. For tier files only.
//
//   Vec, Ints, Mask     fp32 lanes, 32-bit lanes, one truth value per lane
//   load, store         from fp32, bf16 or fp16 / to fp32; with a count n <= kWidth: the first n lanes, the rest `fill`
//   add sub mul div     fma(a, b, c) = a * b + c, one rounding where the tier has it (scalar has not)
//   max, min            return b where either is NaN, so max(limit, x) keeps a NaN and max(x, limit) drops it
//   gt ge eq            false where either is NaN; not_lt(a, b) is true there
//   select(m, a, b)     m ? a : b
//   bits(m), any(m)     bit i is lane i; mask_of(bits) is the way back
//   compress            stores the lanes of m side by side, and whatever up to kWidth lanes in all; how many m has
//   to_floats(_unsigned)  rounds to nearest, once
//   reduce_add          in one fixed order, pairwise; sums_of(a) has that of a[i] in lane i, in an order of its own
//   transpose(a)        lane j of a[i] becomes lane i of a[j]
//   bytes(p, n)         the first n bytes, zero-extended; halves(p, a, n) stores the low 16 bits of n lanes
//   floor, fraction     x - floor(x), which is 0 at -inf in the tiers that have it as an instruction
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

// To the nearest bf16, ties to even. A NaN stays one.
SPECDEC_INLINE void store(Bf16* p, Vec a, int n) {
  const Ints raw = as_ints(a), odd = iand(shift_right(raw, 16), iset1(1));
  const Ints rounded = iadd(raw, iadd(iset1(0x7FFFu), odd));
  halves(&p->bits, shift_right(iselect(eq(a, a), rounded, iset1(0x7FC00000u)), 16), n);
}

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
