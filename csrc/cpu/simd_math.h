// exp, log and the random numbers of specdec_kernels/philox.py, kWidth lanes at a time. For tier files only.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

// e^x to 2 ulp; 0 below -104, +inf above 88.8, NaN stays NaN.
SPECDEC_INLINE Vec exp(Vec x) {
  x = min(set1(89.0f), max(set1(-105.0f), x));
  const Vec n = round(mul(x, set1(0x1.715476p0f)));
  // ln 2 in two parts, the first short enough for n * part to be exact.
  Vec f = fma(n, set1(-0x1.63p-1f), x);
  f = fma(n, set1(0x1.bd0106p-13f), f);
  Vec p = set1(1.98756915e-4f);
  p = fma(p, f, set1(1.39819995e-3f));
  p = fma(p, f, set1(8.33345200e-3f));
  p = fma(p, f, set1(4.16657962e-2f));
  p = fma(p, f, set1(1.66666657e-1f));
  p = fma(p, f, set1(0.5f));
  return scale_by_power(add(fma(mul(f, f), p, f), set1(1.0f)), n);
}

// 2^x for x < 128, to 1 ulp and exact for whole x; 0 below -150, NaN stays NaN.
SPECDEC_INLINE Vec exp2(Vec x) {
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  const Vec f = fraction(x), n = x;  // scaling takes the floor of n by itself
#else
  x = max(set1(-151.0f), x);
  const Vec n = floor(x), f = sub(x, n);
#endif
  // Minimax polynomial of (2^f - 1) / f on [0, 1): what it leaves out is below 2.1e-9.
  Vec p = set1(0x1.c54174p-13f);
  p = fma(p, f, set1(0x1.46d64ep-10f));
  p = fma(p, f, set1(0x1.3d0b92p-7f));
  p = fma(p, f, set1(0x1.c689120p-5f));
  p = fma(p, f, set1(0x1.ebfd58p-3f));
  p = fma(p, f, set1(0x1.62e42cp-1f));
  return scale_by_power(fma(p, f, set1(1.0f)), n);
}

// To 3 ulp; NaN stays NaN.
SPECDEC_INLINE Vec tanh(Vec x) {
  const Vec size = max(x, sub(set1(0.0f), x)), square = mul(x, x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const Vec near = fma(mul(x, square), p, x);
  const Vec far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(size, size)), set1(1.0f))));
  return select(gt(size, set1(0.625f)), select(gt(x, set1(0.0f)), far, sub(set1(0.0f), far)), near);
}

// Natural logarithm of positive normal numbers to 2 ulp (near 1 as well: the noise is most sensitive there).
SPECDEC_INLINE Vec log(Vec x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)): the offset moves the exponent's step to sqrt(1/2).
  const Ints offset = iset1(0x3F3504F3u), raw = isub(as_ints(x), offset);
  const Vec e = to_floats(isub(shift_right(iadd(raw, iset1(0x3F800000u)), 23), iset1(127)));
  const Vec f = sub(as_floats(iadd(iand(raw, iset1(0x007FFFFFu)), offset)), set1(1.0f));
  Vec p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const Vec square = mul(f, f);
  // e ln 2 in two parts, small terms first.
  Vec tail = fma(e, set1(-0x1.bd0106p-13f), mul(mul(square, f), p));
  tail = fma(square, set1(-0.5f), tail);
  return fma(e, set1(0x1.63p-1f), add(f, tail));
}

// log(1 - v) for v in [0, 1) to 2 ulp, however small v is.
SPECDEC_INLINE Vec log_1m(Vec v) {
  const Vec one = set1(1.0f), near = sub(one, v);
  // 1 - v = near + lost without error, and log(near + lost) = log(near) + lost / near to first order. lost is not 0
  // only where v < 1/2, at most 2^-25, and 1 + v is 1 / near to within v^2.
  const Vec lost = sub(sub(one, near), v);
  return fma(lost, add(one, v), log(near));
}

// What a request's draws depend on; the row tells several rows of a request apart.
struct StreamKey {
  uint32_t seed_low, seed_high, offset, stream, row;
};

// Philox4x32-10 word of each column: counter (offset, stream, row, column / 4), lane column % 4.
SPECDEC_INLINE Ints philox(const StreamKey& s, Ints columns) {
  Ints c0 = iset1(s.offset), c1 = iset1(s.stream), c2 = iset1(s.row), c3 = shift_right(columns, 2);
  uint32_t k0 = s.seed_low, k1 = s.seed_high;
  for (int round = 0; round < 10; ++round) {
    Ints high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = ixor(ixor(high1, c1), iset1(k0));
    c2 = ixor(ixor(high0, c3), iset1(k1));
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Ints lane = iand(columns, iset1(3));
  const Ints low = iselect(ieq(lane, iset1(0)), c0, c1), high = iselect(ieq(lane, iset1(2)), c2, c3);
  return iselect(ieq(iand(lane, iset1(2)), iset1(0)), low, high);
}

SPECDEC_INLINE Vec coins(const StreamKey& s, Ints columns) {
  return mul(to_floats(shift_right(philox(s, columns), 8)), set1(0x1p-24f));
}

// Standard Gumbel noise of 32-bit words, -log(-log(1 - v)); v is the gumbel_argument of specdec/philox.h, bit for bit.
// At most kMostNoise: v >= 2^-33 and -log(1 - v) >= v, so the exact noise is at most 33 ln 2 < 22.8739. Errors of 2 ulp
// in each logarithm add less than 5e-6 to that.
constexpr float kMostNoise = 22.875f;
SPECDEC_INLINE Vec gumbels_of(Ints words) {
  const Vec v = min(set1(0x1.fffffep-1f), mul(add(to_floats_unsigned(words), set1(0.5f)), set1(0x1p-32f)));
  const Vec zero = set1(0.0f);
  return sub(zero, log(sub(zero, log_1m(v))));
}
SPECDEC_INLINE Vec gumbels(const StreamKey& s, Ints columns) { return gumbels_of(philox(s, columns)); }

}  // namespace specdec::SPECDEC_TIER
