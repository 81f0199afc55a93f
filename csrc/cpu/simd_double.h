// What sums in fp64 need: the lanes of a Vec as Doubles, and their exponentials. For tier files only.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

// A Vec has kParts Doubles, part(x, i) is the i-th; d... does what the operation on a Vec does. With a NaN, dmax
// returns its second argument.
#if defined(SPECDEC_TIER_AVX2)
constexpr int kParts = 2;
using Doubles = __m256d;
SPECDEC_INLINE Doubles part(Vec x, int i) {
  return _mm256_cvtps_pd(i == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1));
}
SPECDEC_INLINE Doubles dset1(double a) { return _mm256_set1_pd(a); }
SPECDEC_INLINE Doubles dadd(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
SPECDEC_INLINE Doubles dmul(Doubles a, Doubles b) { return _mm256_mul_pd(a, b); }
SPECDEC_INLINE Doubles dfma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
SPECDEC_INLINE Doubles dmax(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
SPECDEC_INLINE Doubles dround(Doubles a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for integral n in [-1022, 1023]: adding 1.5 * 2^52 leaves n in the low bits.
SPECDEC_INLINE Doubles dscale_by_power(Doubles a, Doubles n) {
  const __m256i whole = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(0x1.8p52)));
  const __m256i biased = _mm256_add_epi64(whole, _mm256_set1_epi64x(1023));
  return _mm256_mul_pd(a, _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52)));
}
SPECDEC_INLINE double dreduce_add(Doubles a) {
  const __m128d r = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(r, _mm_unpackhi_pd(r, r)));
}
#elif defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
constexpr int kParts = 2;
using Doubles = __m512d;
SPECDEC_INLINE Doubles part(Vec x, int i) {
  return _mm512_cvtps_pd(i == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
}
SPECDEC_INLINE Doubles dset1(double a) { return _mm512_set1_pd(a); }
SPECDEC_INLINE Doubles dadd(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
SPECDEC_INLINE Doubles dmul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }
SPECDEC_INLINE Doubles dfma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
SPECDEC_INLINE Doubles dmax(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
SPECDEC_INLINE Doubles dround(Doubles a) {
  return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SPECDEC_INLINE Doubles dscale_by_power(Doubles a, Doubles n) { return _mm512_scalef_pd(a, n); }
SPECDEC_INLINE double dreduce_add(Doubles a) { return _mm512_reduce_add_pd(a); }
#else
constexpr int kParts = 1;
using Doubles = double;
SPECDEC_INLINE Doubles part(Vec x, int) { return x; }
SPECDEC_INLINE Doubles dset1(double a) { return a; }
SPECDEC_INLINE Doubles dadd(Doubles a, Doubles b) { return a + b; }
SPECDEC_INLINE Doubles dmul(Doubles a, Doubles b) { return a * b; }
SPECDEC_INLINE Doubles dfma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
SPECDEC_INLINE Doubles dmax(Doubles a, Doubles b) { return a > b ? a : b; }
// Adding 1.5 * 2^52 leaves no room for a fraction (|a| < 2^51).
SPECDEC_INLINE Doubles dround(Doubles a) { return (a + 0x1.8p52) - 0x1.8p52; }
SPECDEC_INLINE Doubles dscale_by_power(Doubles a, Doubles n) {
  const uint64_t biased = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &biased, sizeof power);
  return a * power;
}
SPECDEC_INLINE double dreduce_add(Doubles a) { return a; }
#endif

// e^x for x <= 0 to 2 ulp; e^-700, which is nothing beside 1, for whatever is below that, and for NaN.
SPECDEC_INLINE Doubles exp(Doubles x) {
  x = dmax(x, dset1(-700.0));
  const Doubles n = dround(dmul(x, dset1(0x1.71547652b82fep0)));
  // ln 2 in two parts, the first short enough for n * part to be exact.
  Doubles f = dfma(n, dset1(-0x1.62e42feep-1), x);
  f = dfma(n, dset1(-0x1.a39ef35793c76p-33), f);
  // Taylor's series: what it leaves out of e^f is below 2e-16 for |f| <= ln(2) / 2.
  constexpr double kInverseFactorial[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  Doubles p = dset1(kInverseFactorial[0]);
  for (int i = 1; i < 13; ++i) p = dfma(p, f, dset1(kInverseFactorial[i]));
  return dscale_by_power(p, n);
}

}  // namespace specdec::SPECDEC_TIER
