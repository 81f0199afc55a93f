// Products of a few quantised rows with a few hidden vectors. For tier files only.
//
// A format says, for a stretch of columns, how sums [Batch][kQuantRows] go on, and what they come to:
//   Sum, kPieces    lanes of a sum, and how many of them one product has
//   kStretch        columns whose hidden vectors stay in the first level of the cache while the tile's rows pass
//   kRun            columns after which sums must be emptied into totals
//   advance<Count, Batch, Prefetch>(tile, r, from, to, sums)    for rows r..r + Count
//   collect(sums, pieces, totals)                               totals of kQuantRows products += theirs; piece i of
//                                                               theirs lies at sums + i * pieces
#pragma once

#include "head_quant_pack.h"
#include "head_reduce.h"

namespace specdec::SPECDEC_TIER {

constexpr int kQuantRows = 8;
constexpr int64_t kLine = 64;  // bytes of a row that are prefetched and unrolled together
static_assert(kQuantRows == kReduced);

// A tile of rows, those of the next one to be prefetched, and up to kQuantBatch hidden vectors.
struct QuantTile {
  const uint8_t* row[kQuantRows];
  const uint8_t* ahead[kQuantRows];
  const float* scales[kQuantRows];  // of the groups of int4
  const float* ahead_scales[kQuantRows];
  int64_t dim;
  const char* hidden;
};

SPECDEC_INLINE Ints load_bits(const void* p) {
  Ints bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

// Adds to every 32-bit lane the products of its two pairs of 16-bit numbers.
SPECDEC_INLINE Ints add_pairs(Ints a, Ints b, Ints sum) {
#if defined(SPECDEC_TIER_AVX512BF16)
  return _mm512_dpwssd_epi32(sum, a, b);
#elif defined(SPECDEC_TIER_AVX512)
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#elif defined(SPECDEC_TIER_AVX2)
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#else
  const int32_t low = static_cast<int16_t>(a) * static_cast<int16_t>(b);
  const int32_t high = static_cast<int16_t>(a >> 16) * static_cast<int16_t>(b >> 16);
  return sum + static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
#endif
}

// 2 * kWidth numbers of 8 bits, as 16.
SPECDEC_INLINE Ints widen_bytes(const uint8_t* p) {
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(SPECDEC_TIER_AVX2)
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const auto low = static_cast<uint16_t>(static_cast<int8_t>(p[0]));
  const auto high = static_cast<uint16_t>(static_cast<int8_t>(p[1]));
  return low | static_cast<uint32_t>(high) << 16;
#endif
}

// The nibbles of each 16-bit number from the lowest on, less 8, as 16-bit numbers. What is stored with 8 added to it is
// in two's complement once the highest bit is turned around.
SPECDEC_INLINE void nibbles(Ints packed, Ints (&out)[4]) {
  const Ints p = ixor(packed, iset1(0x88888888u));
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  out[0] = _mm512_srai_epi16(_mm512_slli_epi16(p, 12), 12);
  out[1] = _mm512_srai_epi16(_mm512_slli_epi16(p, 8), 12);
  out[2] = _mm512_srai_epi16(_mm512_slli_epi16(p, 4), 12);
  out[3] = _mm512_srai_epi16(p, 12);
#elif defined(SPECDEC_TIER_AVX2)
  out[0] = _mm256_srai_epi16(_mm256_slli_epi16(p, 12), 12);
  out[1] = _mm256_srai_epi16(_mm256_slli_epi16(p, 8), 12);
  out[2] = _mm256_srai_epi16(_mm256_slli_epi16(p, 4), 12);
  out[3] = _mm256_srai_epi16(p, 12);
#else
  for (int v = 0; v < 4; ++v) {
    const auto low = static_cast<uint32_t>(static_cast<int32_t>(p << (28 - 4 * v)) >> 28);
    const auto high = static_cast<uint32_t>(static_cast<int32_t>(p << (12 - 4 * v)) >> 28);
    out[v] = (low & 0xFFFFu) | high << 16;
  }
#endif
}

// a * b + c with one rounding in every tier, unlike fma.
SPECDEC_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(SPECDEC_TIER_AVX2) || defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  return fma(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// kWidth numbers in e4m3 (no infinities; all exponent and mantissa bits set: NaN), divided by 2^8: in fp16 their bits
// are a number of an exponent that is 8 less, and subnormal where theirs is.
SPECDEC_INLINE Vec fp8_over_256(const uint8_t* p) {
#if defined(SPECDEC_TIER_AVX512) || defined(SPECDEC_TIER_AVX512BF16)
  const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_slli_epi16(half, 1), _mm256_set1_epi16(0x7F00));
  return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7FFF)));
#elif defined(SPECDEC_TIER_AVX2)
  const __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16(static_cast<int16_t>(0xBFFF)));
  const __m128i nan = _mm_cmpeq_epi16(_mm_slli_epi16(half, 1), _mm_set1_epi16(0x7F00));
  return _mm256_cvtph_ps(_mm_or_si128(half, _mm_srli_epi16(nan, 1)));
#else
  const uint32_t magnitude = *p & 0x7Fu;
  const Half half = {static_cast<uint16_t>((*p & 0x80u) << 8 | (magnitude == 0x7Fu ? 0x7FFFu : magnitude << 7))};
  return load(&half);
#endif
}

// What int8 and fp8 share: vectors of a row meet vectors of a hidden vector in the order of the columns.
template <typename Format, int Count, int Batch, bool Prefetch>
SPECDEC_INLINE void advance_in_order(const QuantTile& tile, int r0, int64_t from, int64_t to,
                                     typename Format::Sum* sums) {
  typename Format::Sum sum[Count][Batch];
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) sum[r][b] = sums[b * kQuantRows + r0 + r];
  }
  using Number = typename Format::Number;
  const auto line = [&](const uint8_t* const* w, int64_t d) __attribute__((always_inline)) {
    const auto* piece = reinterpret_cast<const Number*>(tile.hidden + Batch * PackedLayout::kUnitBytes) + d * Batch;
#pragma GCC unroll 4
    for (int s = 0; s < kLine; s += Format::kStep) {
      decltype(Format::hidden(piece)) x[Batch];
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b) x[b] = Format::hidden(piece + b * kLine + s);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        const auto row = Format::row(w[r] + s);
#pragma GCC unroll 4
        for (int b = 0; b < Batch; ++b) sum[r][b] = Format::step(row, x[b], sum[r][b]);
      }
    }
  };
  const uint8_t* w[Count];
  int64_t d = from;
  for (; d + kLine <= to; d += kLine) {
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      w[r] = tile.row[r0 + r] + d;
      // To the second level: a tile ahead is more than the first holds, and has many more fills in flight there.
      if (Prefetch) __builtin_prefetch(tile.ahead[r0 + r] + d, 0, 2);
    }
    line(w, d);
  }
  if (d < to) {
    uint8_t tail[Count][kLine] = {};  // 0 is 0 in either format
    for (int r = 0; r < Count; ++r) {
      __builtin_memcpy(tail[r], tile.row[r0 + r] + d, to - d);
      w[r] = tail[r];
    }
    line(w, d);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) sums[b * kQuantRows + r0 + r] = sum[r][b];
  }
}

// Whole numbers; a lane has room for 256 pairs of products: 256 * 2 * 128 * 32767 < 2^31.
struct Int8Rows {
  using Sum = Ints;
  using Number = int16_t;
  static constexpr int kPieces = 1;
  static constexpr int64_t kStep = 2 * kWidth, kRun = 256 * kStep, kStretch = kRun < 1024 ? kRun : 1024;

  SPECDEC_INLINE Sum zero() { return iset1(0); }
  SPECDEC_INLINE Ints row(const uint8_t* p) { return widen_bytes(p); }
  SPECDEC_INLINE Ints hidden(const Number* p) { return load_bits(p); }
  SPECDEC_INLINE Sum step(Ints w, Ints x, Sum sum) { return add_pairs(w, x, sum); }
  template <int Count, int Batch, bool Prefetch>
  SPECDEC_INLINE void advance(const QuantTile& tile, int r0, int64_t from, int64_t to, Sum* sums) {
    advance_in_order<Int8Rows, Count, Batch, Prefetch>(tile, r0, from, to, sums);
  }
  // Both halves of a lane, and their sums, are exact in fp32.
  SPECDEC_INLINE void collect(const Sum* sums, int, double* totals) {
    Vec low[kReduced], high[kReduced];
    float lows[kReduced], highs[kReduced];
    for (int i = 0; i < kReduced; ++i) {
      const Ints biased = ixor(sums[i], iset1(0x80000000u));
      low[i] = to_floats(iand(biased, iset1(0xFFFFu)));
      high[i] = to_floats(shift_right(biased, 16));
    }
    reduce_add(low, lows);
    reduce_add(high, highs);
    for (int i = 0; i < kReduced; ++i) totals[i] += highs[i] * 0x1p16 + lows[i] - kWidth * 0x1p31;
  }
};

struct Fp8Rows {
  using Sum = Vec;
  using Number = float;
  static constexpr int kPieces = 1;
  static constexpr int64_t kStep = kWidth, kRun = INT64_MAX, kStretch = 512;

  SPECDEC_INLINE Sum zero() { return set1(0.0f); }
  SPECDEC_INLINE Vec row(const uint8_t* p) { return fp8_over_256(p); }
  SPECDEC_INLINE Vec hidden(const Number* p) { return load(p); }
  SPECDEC_INLINE Sum step(Vec w, Vec x, Sum sum) { return fma(w, x, sum); }
  template <int Count, int Batch, bool Prefetch>
  SPECDEC_INLINE void advance(const QuantTile& tile, int r0, int64_t from, int64_t to, Sum* sums) {
    advance_in_order<Fp8Rows, Count, Batch, Prefetch>(tile, r0, from, to, sums);
  }
  SPECDEC_INLINE void collect(const Sum* sums, int, double* totals) {
    Vec sum[kReduced];
    float values[kReduced];
    for (int i = 0; i < kReduced; ++i) sum[i] = sums[i];
    reduce_add(sum, values);
    for (int i = 0; i < kReduced; ++i) totals[i] += values[i];
  }
};

// Lane l of kLanes sums, over the groups, the products of bytes 4l..4l+3 times the group's scale. A group's share is a
// whole number below 2^22, so it is exact in fp32.
struct Int4Rows {
  using Sum = Vec;
  static constexpr int kPieces = kLanes / kWidth;
  static constexpr int64_t kRun = INT64_MAX, kStretch = 8 * kHeadColumns;

  SPECDEC_INLINE Sum zero() { return set1(0.0f); }

  // Two rows, which share what is loaded of the hidden vectors: their nibbles fill the registers. A narrow tier goes
  // over a group's lanes in pieces.
  template <int Count, int Batch, bool Prefetch>
  SPECDEC_INLINE void advance(const QuantTile& tile, int r0, int64_t from, int64_t to, Sum* sums) {
    static_assert(Count == 2);
    const auto* words = reinterpret_cast<const int16_t*>(tile.hidden + Batch * PackedLayout::kUnitBytes);
    for (int piece = 0; piece < kPieces; ++piece, sums += kQuantRows * Batch) {
      const int lane = piece * kWidth;
      Vec sum[Count][Batch];
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b)
        for (int r = 0; r < Count; ++r) sum[r][b] = sums[b * kQuantRows + r0 + r];
      for (int64_t g = from / kHeadColumns; g * kHeadColumns < to; ++g) {
        Ints w[Count][4];
#pragma GCC unroll 2
        for (int r = 0; r < Count; ++r) {
          if (Prefetch && piece == 0) {
            __builtin_prefetch(tile.ahead[r0 + r] + g * kLine, 0, 2);
            if (g % kLanes == 0) __builtin_prefetch(tile.ahead_scales[r0 + r] + g, 0, 2);
          }
          nibbles(load_bits(tile.row[r0 + r] + g * kLine + lane * 4), w[r]);
        }
#pragma GCC unroll 4
        for (int b = 0; b < Batch; ++b) {
          const int16_t* x = words + (g * Batch + b) * kHeadColumns;
          Ints share[Count];
#pragma GCC unroll 2
          for (int r = 0; r < Count; ++r) share[r] = iset1(0);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const Ints part = load_bits(x + v * 2 * kLanes + 2 * lane);
#pragma GCC unroll 2
            for (int r = 0; r < Count; ++r) share[r] = add_pairs(w[r][v], part, share[r]);
          }
#pragma GCC unroll 2
          for (int r = 0; r < Count; ++r)
            sum[r][b] = fused(to_floats(share[r]), set1(tile.scales[r0 + r][g]), sum[r][b]);
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b)
        for (int r = 0; r < Count; ++r) sums[b * kQuantRows + r0 + r] = sum[r][b];
    }
  }

  // The far half of the lanes is added to the near one until one is left.
  SPECDEC_INLINE void collect(const Sum* sums, int pieces, double* totals) {
    Vec sum[kReduced];
    float values[kReduced];
    for (int i = 0; i < kReduced; ++i) {
      Vec piece[kPieces];
      for (int p = 0; p < kPieces; ++p) piece[p] = sums[p * pieces + i];
      for (int half = kPieces / 2; half > 0; half /= 2)
        for (int p = 0; p < half; ++p) piece[p] = add(piece[p], piece[p + half]);
      sum[i] = piece[0];
    }
    reduce_add(sum, values);
    for (int i = 0; i < kReduced; ++i) totals[i] += values[i];
  }
};

}  // namespace specdec::SPECDEC_TIER
