// Dot products of a few weight rows with a few hidden vectors. For tier files only.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

constexpr int kTileRows = 4;
// Accumulators, a row and the hidden vectors stay in registers: 32 of them with AVX-512, else 16.
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

// out[b * stride + r] = rows[r] . hidden[b]. The order of additions within a product does not depend on Batch: a
// request's logits are the same whatever its neighbours. `ahead` are the rows of the next tile, to be prefetched.
template <typename Dot, int Batch, bool Prefetch>
SPECDEC_INLINE void dot_tile(const typename Dot::Weight* const* rows, const typename Dot::Weight* const* ahead,
                             const typename Dot::Hidden* hidden, int64_t dim, float* out, int64_t stride) {
  const int64_t hidden_stride = packed_stride(dim);
  Vec sums[kTileRows][Batch];
  for (auto& row : sums)
    for (Vec& sum : row) sum = set1(0.0f);
  int64_t d = 0;
  for (; d + Dot::kStep <= dim; d += Dot::kStep) {
    typename Dot::Row x[Batch];
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) x[b] = Dot::hidden(hidden + b * hidden_stride + d);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d);
      if (Prefetch) __builtin_prefetch(ahead[r] + d);
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b) sums[r][b] = Dot::step(w, x[b], sums[r][b]);
    }
  }
  if (d < dim) {
    for (int r = 0; r < kTileRows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d, static_cast<int>(dim - d));
      for (int b = 0; b < Batch; ++b)
        sums[r][b] = Dot::step(w, Dot::hidden(hidden + b * hidden_stride + d), sums[r][b]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int b = 0; b < Batch; ++b) out[b * stride + r] = reduce_add(sums[r][b]);
}

// The same for any number of hidden vectors; only the first tile prefetches.
template <typename Dot>
SPECDEC_INLINE void dot_rows(const typename Dot::Weight* const* rows, const typename Dot::Weight* const* ahead,
                             const typename Dot::Hidden* hidden, int64_t batch, int64_t dim, float* out,
                             int64_t stride) {
  const int64_t hidden_stride = packed_stride(dim);
  int64_t b = 0;
  if (batch >= kTileBatch) {
    dot_tile<Dot, kTileBatch, true>(rows, ahead, hidden, dim, out, stride);
    for (b = kTileBatch; b + kTileBatch <= batch; b += kTileBatch)
      dot_tile<Dot, kTileBatch, false>(rows, ahead, hidden + b * hidden_stride, dim, out + b * stride, stride);
  }
  const auto* rest = hidden + b * hidden_stride;
  switch (batch - b) {
    case 1:
      return dot_tile<Dot, 1, true>(rows, ahead, rest, dim, out + b * stride, stride);
    case 2:
      return dot_tile<Dot, 2, true>(rows, ahead, rest, dim, out + b * stride, stride);
    case 3:
      return dot_tile<Dot, 3, true>(rows, ahead, rest, dim, out + b * stride, stride);
  }
}

}  // namespace specdec::SPECDEC_TIER
