// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

namespace specdec::SPECDEC_TIER {

constexpr int kWidth = 16;
using Vec = __m512;
using Ints = __m512i;
using Mask = __mmask16;

SPECDEC_INLINE Vec as_floats(Ints a) { return _mm512_castsi512_ps(a); }
SPECDEC_INLINE Ints as_ints(Vec a) { return _mm512_castps_si512(a); }
SPECDEC_INLINE Mask first(int n) { return static_cast<Mask>((1u << n) - 1u); }

SPECDEC_INLINE Vec set1(float a) { return _mm512_set1_ps(a); }
SPECDEC_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
SPECDEC_INLINE Vec widen(__m256i raw, const Bf16*) {
  return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
SPECDEC_INLINE Vec widen(__m256i raw, const Half*) { return _mm512_cvtph_ps(raw); }
SPECDEC_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
template <typename T>
SPECDEC_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
SPECDEC_INLINE Vec load(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(set1(fill), first(n), p); }
template <typename T>
SPECDEC_INLINE Vec load(const T* p, int n, float fill) {
  return select(first(n), widen(_mm256_maskz_loadu_epi16(first(n), p), p), set1(fill));
}
SPECDEC_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
SPECDEC_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

SPECDEC_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SPECDEC_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
SPECDEC_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SPECDEC_INLINE Vec floor(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
SPECDEC_INLINE Vec fraction(Vec a) { return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

SPECDEC_INLINE Mask gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SPECDEC_INLINE Mask ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
SPECDEC_INLINE Mask eq(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
SPECDEC_INLINE Mask not_lt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
SPECDEC_INLINE Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
SPECDEC_INLINE Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
SPECDEC_INLINE uint32_t bits(Mask m) { return m; }
SPECDEC_INLINE bool any(Mask m) { return m != 0; }
SPECDEC_INLINE Mask mask_of(uint32_t bits) { return static_cast<Mask>(bits); }

SPECDEC_INLINE int compress(float* p, Mask m, Vec a) {
  store(p, _mm512_maskz_compress_ps(m, a));
  return __builtin_popcount(m);
}

SPECDEC_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
SPECDEC_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
SPECDEC_INLINE Vec unpack_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
SPECDEC_INLINE Vec unpack_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
SPECDEC_INLINE Vec unpack_low_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
SPECDEC_INLINE Vec unpack_high_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
// The even and the odd quarters of a, then of b.
SPECDEC_INLINE Vec even_quarters(Vec a, Vec b) { return _mm512_shuffle_f32x4(a, b, 0x88); }
SPECDEC_INLINE Vec odd_quarters(Vec a, Vec b) { return _mm512_shuffle_f32x4(a, b, 0xDD); }
SPECDEC_INLINE Vec sums_of(const Vec* a) {
  // Pairs of lanes of two vectors, then of four; what is left are the four quarters of each.
  Vec pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i) pairs[i] = add(unpack_low(a[2 * i], a[2 * i + 1]), unpack_high(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const Vec x = pairs[2 * i], y = pairs[2 * i + 1];
    fours[i] = add(unpack_low_pairs(x, y), unpack_high_pairs(x, y));
  }
  for (int i = 0; i < 2; ++i) {
    const Vec x = fours[2 * i], y = fours[2 * i + 1];
    halves[i] = add(even_quarters(x, y), odd_quarters(x, y));
  }
  return add(even_quarters(halves[0], halves[1]), odd_quarters(halves[0], halves[1]));
}
SPECDEC_INLINE void transpose(Vec* a) {
  Vec b[16], c[16];
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = unpack_low(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = unpack_high(a[2 * i], a[2 * i + 1]);
  }
  // c[4 i + j]: columns j, j + 4, j + 8 and j + 12 of rows 4 i .. 4 i + 3, a quarter each.
  for (int i = 0; i < 16; ++i) {
    const Vec x = b[i / 4 * 4 + i % 4 / 2], y = b[i / 4 * 4 + i % 4 / 2 + 2];
    c[i] = i % 2 == 0 ? unpack_low_pairs(x, y) : unpack_high_pairs(x, y);
  }
  for (int j = 0; j < 4; ++j) {
    const Vec even0 = even_quarters(c[j], c[4 + j]), odd0 = odd_quarters(c[j], c[4 + j]);
    const Vec even1 = even_quarters(c[8 + j], c[12 + j]), odd1 = odd_quarters(c[8 + j], c[12 + j]);
    a[j] = even_quarters(even0, even1);
    a[j + 4] = even_quarters(odd0, odd1);
    a[j + 8] = odd_quarters(even0, even1);
    a[j + 12] = odd_quarters(odd0, odd1);
  }
}

SPECDEC_INLINE Ints iset1(uint32_t a) { return _mm512_set1_epi32(static_cast<int32_t>(a)); }
SPECDEC_INLINE Ints bytes(const uint8_t* p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
SPECDEC_INLINE void halves(uint16_t* p, Ints a, int n) { _mm512_mask_cvtepi32_storeu_epi16(p, first(n), a); }
SPECDEC_INLINE void store(Half* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
SPECDEC_INLINE Ints iload(const int32_t* p) { return _mm512_loadu_si512(p); }
SPECDEC_INLINE Ints iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
SPECDEC_INLINE Ints iadd(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
SPECDEC_INLINE Ints isub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
SPECDEC_INLINE Ints iand(Ints a, Ints b) { return _mm512_and_si512(a, b); }
SPECDEC_INLINE Ints ixor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
SPECDEC_INLINE Ints shift_left(Ints a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
SPECDEC_INLINE Ints shift_right(Ints a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
SPECDEC_INLINE Mask ieq(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
SPECDEC_INLINE Ints iselect(Mask m, Ints a, Ints b) { return _mm512_mask_blend_epi32(m, b, a); }
SPECDEC_INLINE Vec to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }  // signed
SPECDEC_INLINE Vec to_floats_unsigned(Ints a) { return _mm512_cvtepu32_ps(a); }
SPECDEC_INLINE Ints to_ints(Vec a) { return _mm512_cvttps_epi32(a); }
SPECDEC_INLINE void multiply_wide(Ints a, uint32_t b, Ints* high, Ints* low) {
  const Ints factor = iset1(b);
  const Ints even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  *low = _mm512_mullo_epi32(a, factor);
}

SPECDEC_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

}  // namespace specdec::SPECDEC_TIER
