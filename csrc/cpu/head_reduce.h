// Sums of the lanes of many vectors at once. For tier files only.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

constexpr int kReduced = 8;

// out[i] = sum of v[i]'s lanes, the far half added to the near one until one lane is left: the order of reduce_add at a
// third of its instructions, which would be a tenth of all where D is 2048.
SPECDEC_INLINE void reduce_add(const Vec (&v)[kReduced], float* out) {
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  const auto halves = [](Vec a, Vec b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto quarters = [](Vec a, Vec b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const Vec low = quarters(halves(v[0], v[1]), halves(v[2], v[3]));
  const Vec high = quarters(halves(v[4], v[5]), halves(v[6], v[7]));
  const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
  const Vec pairs = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const Vec sums = add(pairs, _mm512_movehdup_ps(pairs));  // of 0, 4, 1, 5, 2, 6, 3, 7, in every other lane
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
#elif defined(SPECDEC_TIER_AVX2)
  const auto halves = [](Vec a, Vec b) {
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto pairs = [](Vec x, Vec y) {
    const __m256d a = _mm256_castps_pd(x), b = _mm256_castps_pd(y);
    return add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  const Vec low = pairs(halves(v[0], v[1]), halves(v[2], v[3]));
  const Vec high = pairs(halves(v[4], v[5]), halves(v[6], v[7]));
  const Vec sums = add(_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xDD));  // 0 2 4 6 1 3 5 7
  store(out, _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  for (int i = 0; i < kReduced; ++i) out[i] = reduce_add(v[i]);
#endif
}

}  // namespace specdec::SPECDEC_TIER
