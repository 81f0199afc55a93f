// Eight lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace specdec::SPECDEC_TIER {

constexpr int kWidth = 8;
using Vec = __m256;
using Ints = __m256i;
using Mask = __m256;  // all bits of a lane set, or none

SPECDEC_INLINE Vec as_floats(Ints a) { return _mm256_castsi256_ps(a); }
SPECDEC_INLINE Ints as_ints(Vec a) { return _mm256_castps_si256(a); }
SPECDEC_INLINE Ints iset1(uint32_t a) { return _mm256_set1_epi32(static_cast<int32_t>(a)); }
SPECDEC_INLINE Ints iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
SPECDEC_INLINE Mask first(int n) { return as_floats(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota())); }

SPECDEC_INLINE Vec set1(float a) { return _mm256_set1_ps(a); }
SPECDEC_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, m); }
SPECDEC_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SPECDEC_INLINE Vec load(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
SPECDEC_INLINE Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SPECDEC_INLINE Vec load(const float* p, int n, float fill) {
  return select(first(n), _mm256_maskload_ps(p, as_ints(first(n))), set1(fill));
}
template <typename T>
SPECDEC_INLINE Vec load(const T* p, int n, float fill) {
  T buffer[kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return select(first(n), load(buffer), set1(fill));
}
SPECDEC_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
SPECDEC_INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, as_ints(first(n)), a); }

SPECDEC_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SPECDEC_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
SPECDEC_INLINE Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SPECDEC_INLINE Vec floor(Vec a) { return _mm256_floor_ps(a); }

SPECDEC_INLINE Mask gt(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
SPECDEC_INLINE Mask ge(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
SPECDEC_INLINE Mask eq(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
SPECDEC_INLINE Mask not_lt(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
SPECDEC_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
SPECDEC_INLINE Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
SPECDEC_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
SPECDEC_INLINE bool any(Mask m) { return bits(m) != 0; }
SPECDEC_INLINE Mask mask_of(uint32_t bits) {
  const Ints lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return as_floats(_mm256_cmpeq_epi32(_mm256_and_si256(iset1(bits), lanes), lanes));
}

SPECDEC_INLINE int compress(float* p, Mask m, Vec a) {
  // A byte of ones per lane that is kept picks the lane's number.
  const uint64_t kept = _pdep_u64(bits(m), 0x0101010101010101u) * 0xFF;
  const __m128i numbers = _mm_cvtsi64_si128(static_cast<int64_t>(_pext_u64(0x0706050403020100u, kept)));
  store(p, _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(numbers)));
  return __builtin_popcount(bits(m));
}

SPECDEC_INLINE float reduce_add(Vec a) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
SPECDEC_INLINE float reduce_max(Vec a) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
SPECDEC_INLINE Vec sums_of(const Vec* a) {
  // Pairs of lanes of two vectors, then of four; what is left are the two halves of each.
  Vec pairs[4], fours[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = add(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(pairs[2 * i]), y = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return add(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
SPECDEC_INLINE void transpose(Vec* a) {
  Vec pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 8; ++i) {
    const int from = i / 4 * 4 + i % 4 / 2;
    const __m256d x = _mm256_castps_pd(pairs[from]), y = _mm256_castps_pd(pairs[from + 2]);
    fours[i] = _mm256_castpd_ps(i % 2 == 0 ? _mm256_unpacklo_pd(x, y) : _mm256_unpackhi_pd(x, y));
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

SPECDEC_INLINE Ints bytes(const uint8_t* p, int n) {
  uint64_t raw = 0;
  __builtin_memcpy(&raw, p, static_cast<size_t>(n));
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(raw)));
}
SPECDEC_INLINE void halves(uint16_t* p, Ints a, int n) {
  const Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a, iset1(0xFFFFu)), iset1(0)), 0x8);
  uint16_t buffer[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(n == kWidth ? p : buffer), _mm256_castsi256_si128(packed));
  if (n != kWidth) __builtin_memcpy(p, buffer, sizeof(uint16_t) * static_cast<size_t>(n));
}
SPECDEC_INLINE void store(Half* p, Vec a, int n) { halves(&p->bits, _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, 0)), n); }
SPECDEC_INLINE Ints iload(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SPECDEC_INLINE Ints iadd(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
SPECDEC_INLINE Ints isub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
SPECDEC_INLINE Ints iand(Ints a, Ints b) { return _mm256_and_si256(a, b); }
SPECDEC_INLINE Ints ixor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
SPECDEC_INLINE Ints shift_left(Ints a, int n) { return _mm256_slli_epi32(a, n); }
SPECDEC_INLINE Ints shift_right(Ints a, int n) { return _mm256_srli_epi32(a, n); }
SPECDEC_INLINE Mask ieq(Ints a, Ints b) { return as_floats(_mm256_cmpeq_epi32(a, b)); }
SPECDEC_INLINE Ints iselect(Mask m, Ints a, Ints b) { return as_ints(select(m, as_floats(a), as_floats(b))); }
SPECDEC_INLINE Vec to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }  // signed
// Both halves are exact, and so is the multiple of 2^16: one rounding, in the sum.
SPECDEC_INLINE Vec to_floats_unsigned(Ints a) {
  return fma(to_floats(shift_right(a, 16)), set1(0x1p16f), to_floats(iand(a, iset1(0xFFFFu))));
}
SPECDEC_INLINE Ints to_ints(Vec a) { return _mm256_cvttps_epi32(a); }
SPECDEC_INLINE void multiply_wide(Ints a, uint32_t b, Ints* high, Ints* low) {
  const Ints factor = iset1(b);
  const Ints even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_mullo_epi32(a, factor);
}

// a * 2^n for integral n in [-252, 254]: in two steps, because 2^n alone may not be representable.
SPECDEC_INLINE Vec scale_by_power(Vec a, Vec n) {
  const Ints whole = to_ints(n), half = _mm256_srai_epi32(whole, 1), bias = iset1(127);
  const Ints low = shift_left(iadd(half, bias), 23), high = shift_left(iadd(isub(whole, half), bias), 23);
  return mul(mul(a, as_floats(low)), as_floats(high));
}

}  // namespace specdec::SPECDEC_TIER
