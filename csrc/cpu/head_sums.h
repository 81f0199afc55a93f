// What log-sum-exp and entropy are made of: sums whose terms do not depend on how the rows are cut into blocks.
#pragma once

#include "head.h"
#include "simd_double.h"

namespace specdec::SPECDEC_TIER {

// A power of two this small is nothing beside the anchor's term, which is at least 1.
constexpr double kLeastPower = -1000.0;

// log2(e) / temperature; temperature 0 counts as 1.
SPECDEC_INLINE double power_scale(float temperature) {
  return 0x1.71547652b82fep0 / (temperature > 0.0f ? temperature : 1.0f);
}

// To the nearest integer; what is too large to have a fraction may be any size.
SPECDEC_INLINE Doubles to_whole(Doubles a) {
#if defined(SPECDEC_TIER_AVX2) || defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  return dround(a);
#else
  return a > -0x1p51 && a < 0x1p51 ? dround(a) : a;
#endif
}

SPECDEC_INLINE Vec narrow(const Doubles* parts) {
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(parts[0])), _mm512_cvtpd_ps(parts[1]), 1);
#elif defined(SPECDEC_TIER_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(parts[0])), _mm256_cvtpd_ps(parts[1]), 1);
#else
  return static_cast<float>(parts[0]);
#endif
}

// 2^f - 1 for |f| <= 1/2 to 4e-8: minimax, all but the 2e-9 of it is rounding.
SPECDEC_INLINE Vec exp2_minus_1(Vec f) {
  Vec p = set1(0x1.448fc2p-13f);
  p = fma(p, f, set1(0x1.5f47bp-10f));
  p = fma(p, f, set1(0x1.3b29aap-7f));
  p = fma(p, f, set1(0x1.c6aedp-5f));
  p = fma(p, f, set1(0x1.ebfbep-3f));
  p = fma(p, f, set1(0x1.62e43p-1f));
  return mul(p, f);
}

// Of `size` logits, padded with -inf to whole vectors, of which `most` is the largest and none is NaN or +inf.
SPECDEC_INLINE HeadSums sum_block(const float* logits, int size, float most, double scale) {
  if (most == -kInf) return {-__builtin_inf(), 0.0, 0.0};
  const double largest = static_cast<double>(most) * scale, anchor = __builtin_floor(largest);
  Doubles sum = dset1(0.0), weighted = dset1(0.0);
  for (int i = 0; i < size; i += kWidth) {
    const Vec l = load(logits + i);
    Doubles t[kParts], whole[kParts], fraction[kParts];
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) {
      t[j] = dmax(dmul(part(l, j), dset1(scale)), dset1(-0x1p1000));  // -inf has no fraction
      whole[j] = to_whole(t[j]);
      fraction[j] = dadd(t[j], dmul(whole[j], dset1(-1.0)));
    }
    const Vec power = exp2_minus_1(narrow(fraction));
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) {
      // Exact from here on but for the additions to `sum` and `weighted`, and for t - anchor.
      const Doubles shift = dmax(dadd(whole[j], dset1(-anchor)), dset1(kLeastPower));
      const Doubles above = dmax(dadd(t[j], dset1(-anchor)), dset1(kLeastPower));
      const Doubles term = dscale_by_power(dadd(part(power, j), dset1(1.0)), shift);
      sum = dadd(sum, term);
      weighted = dfma(term, above, weighted);
    }
  }
  return {anchor, dreduce_add(sum), dreduce_add(weighted)};
}

SPECDEC_INLINE HeadSums merge(const HeadSums* sums, int64_t n) {
  HeadSums all = {-__builtin_inf(), 0.0, 0.0};
  for (int64_t i = 0; i < n; ++i) {
    if (sums[i].sum != sums[i].sum) return sums[i];
    if (sums[i].anchor > all.anchor) all.anchor = sums[i].anchor;
  }
  if (all.anchor == -__builtin_inf()) return all;
  for (int64_t i = 0; i < n; ++i) {
    if (sums[i].sum == 0.0) continue;
    const double lower = sums[i].anchor - all.anchor;
    if (lower < kLeastPower) continue;
    const double factor = __builtin_ldexp(1.0, static_cast<int>(lower));
    all.sum += factor * sums[i].sum;
    all.weighted += factor * (sums[i].weighted + lower * sums[i].sum);
  }
  return all;
}

}  // namespace specdec::SPECDEC_TIER
