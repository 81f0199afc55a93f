// Dot products of a few weight rows with a few hidden vectors. For tier files only.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

// Rows that go together: eight streams of memory saturate it where four do not.
constexpr int kTileRows = 8;
// With several hidden vectors they go by halves, so that accumulators, a row and the hidden vectors stay in registers:
// 32 of them with AVX-512, else 16.
constexpr int kHalfRows = 4;
constexpr int kTileBatch = kWidth == 16 ? 4 : 3;

// Hidden vectors are packed contiguously and padded with zeros to a multiple of this many elements.
constexpr int64_t kPackedStep = 32;
SPECDEC_INLINE int64_t packed_stride(int64_t dim) { return (dim + kPackedStep - 1) / kPackedStep * kPackedStep; }

// Rows of T, hidden vectors in fp32.
template <typename T>
struct FmaDot {
  using Weight = T;
  using Hidden = float;
  using Row = Vec;
  static constexpr int kStep = kWidth;

  SPECDEC_INLINE Row row(const Weight* p) { return load(p); }
  SPECDEC_INLINE Row row(const Weight* p, int n) { return load(p, n, 0.0f); }
  SPECDEC_INLINE Row hidden(const Hidden* p) { return load(p); }
  SPECDEC_INLINE Vec step(Row w, Row x, Vec sum) { return fma(w, x, sum); }
};

#if defined(SPECDEC_TIER_AVX512BF16)
// Pairs of bf16 products, added in fp32.
struct Bf16Dot {
  using Weight = Bf16;
  using Hidden = Bf16;
  using Row = __m512bh;
  static constexpr int kStep = 32;

  SPECDEC_INLINE Row row(const Weight* p) { return reinterpret_cast<Row>(_mm512_loadu_si512(p)); }
  SPECDEC_INLINE Row row(const Weight* p, int n) {
    return reinterpret_cast<Row>(_mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p));
  }
  SPECDEC_INLINE Row hidden(const Hidden* p) { return row(p); }
  SPECDEC_INLINE Vec step(Row w, Row x, Vec sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

// out[b * stride + r] = rows[r] . hidden[b]. The order of additions within a product depends on neither Rows nor Batch:
// a request's logits are the same whatever its neighbours. `ahead` are the rows of the next tile, to be prefetched.
template <typename Dot, int Rows, int Batch, bool Prefetch>
SPECDEC_INLINE void dot_tile(const typename Dot::Weight* const* rows, const typename Dot::Weight* const* ahead,
                             const typename Dot::Hidden* hidden, int64_t dim, float* out, int64_t stride) {
  const int64_t hidden_stride = packed_stride(dim);
  Vec sums[Rows][Batch];
  for (auto& row : sums)
    for (Vec& sum : row) sum = set1(0.0f);
  int64_t d = 0;
  for (; d + Dot::kStep <= dim; d += Dot::kStep) {
    typename Dot::Row x[Batch];
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) x[b] = Dot::hidden(hidden + b * hidden_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d);
      // To the second level: a tile ahead is more than the first holds, and has many more fills in flight there.
      if (Prefetch) __builtin_prefetch(ahead[r] + d, 0, 2);
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b) sums[r][b] = Dot::step(w, x[b], sums[r][b]);
    }
  }
  if (d < dim) {
    for (int r = 0; r < Rows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d, static_cast<int>(dim - d));
      for (int b = 0; b < Batch; ++b)
        sums[r][b] = Dot::step(w, Dot::hidden(hidden + b * hidden_stride + d), sums[r][b]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Batch; ++b) out[b * stride + r] = reduce_add(sums[r][b]);
}

// The same for kTileRows rows and any number of hidden vectors; only the first of them prefetch.
template <typename Dot>
SPECDEC_INLINE void dot_rows(const typename Dot::Weight* const* rows, const typename Dot::Weight* const* ahead,
                             const typename Dot::Hidden* hidden, int64_t batch, int64_t dim, float* out,
                             int64_t stride) {
  const int64_t rest = batch % kTileBatch, whole = batch - rest;
  const auto* last = hidden + whole * packed_stride(dim);
  float* last_out = out + whole * stride;
  for (int r = 0; r < kTileRows && batch > 1; r += kHalfRows) {
    if (whole > 0) dot_tile<Dot, kHalfRows, kTileBatch, true>(rows + r, ahead + r, hidden, dim, out + r, stride);
    for (int64_t b = kTileBatch; b < whole; b += kTileBatch) {
      const auto* x = hidden + b * packed_stride(dim);
      dot_tile<Dot, kHalfRows, kTileBatch, false>(rows + r, ahead + r, x, dim, out + b * stride + r, stride);
    }
    if (rest == 2) dot_tile<Dot, kHalfRows, 2, true>(rows + r, ahead + r, last, dim, last_out + r, stride);
    if (rest == 3) dot_tile<Dot, kHalfRows, 3, true>(rows + r, ahead + r, last, dim, last_out + r, stride);
  }
  if (rest == 1) dot_tile<Dot, kTileRows, 1, true>(rows, ahead, last, dim, last_out, stride);
}

}  // namespace specdec::SPECDEC_TIER
