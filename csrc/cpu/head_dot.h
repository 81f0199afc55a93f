// Dot products of a few weight rows with hidden vectors. For tier files only.
//
// What head_scan.h needs of a Dot, the product with one kind of weight:
//   Weight, Hidden            elements of a stored row and of a packed hidden vector
//   hidden_stride(dim)        Hidden elements of a packed vector, whole cache lines
//   pack(args, run, to)       packs the hidden vectors of a run
//   tile_rows(batch)          rows that go together; divides kHeadBlock, at most kMostTileRows
//   multiply(tile, hidden, batch, dim, out, stride)
//                             out[b * stride + r] = row r of the tile . hidden vector b of a packed run, by an order of
//                             additions that does not depend on batch: a request's logits are the same whatever its
//                             neighbours
#pragma once

#include "head.h"
#include "head_reduce.h"

namespace specdec::SPECDEC_TIER {

constexpr int kMostTileRows = 8;

template <typename Weight>
struct RowTile {
  const Weight* row[kMostTileRows];
  const Weight* ahead[kMostTileRows];  // rows of the next tile, to be prefetched
};

// Accumulators, one row's vector and the hidden vectors stay in registers: 32 of them with AVX-512, else 16. Alone, a
// hidden vector meets 8 rows, because 8 streams of memory saturate it where 4 do not.
constexpr int kTileBatch = kWidth == 16 ? 4 : 3;
constexpr int rows_beside(int batch) {
  if (kWidth == 16) return batch < kTileBatch ? 8 : 6;
  return batch == 1 ? 8 : batch == 2 ? 6 : 4;
}

// More hidden vectors than that go over one stretch of the rows, of two KiB each, while it is in the first level of the
// cache, four tiles at a time; their accumulators wait beside it.
constexpr int kPassTiles = 4;
constexpr int64_t kStretchBytes = 2048;

template <typename T>
SPECDEC_INLINE float load_one(const T* p) {
  float lanes[kWidth];
  store(lanes, load(p, 1, 0.0f));
  return lanes[0];
}

// Adds elements [from, to) of Rows x Batch products to `sums` [Batch, Rows], or starts them where from is 0. Of the
// next tile's rows, Ahead are prefetched, from ahead[0] on.
template <typename Dot, int Rows, int Batch, int Ahead>
__attribute__((noinline)) void dot_tile(const typename Dot::Weight* const* rows,
                                        const typename Dot::Weight* const* ahead, const typename Dot::Hidden* hidden,
                                        int64_t from, int64_t to, Vec* sums) {
  constexpr int64_t kPerLine = 64 / sizeof(typename Dot::Weight);
  Vec sum[Rows][Batch];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) sum[r][b] = from == 0 ? set1(0.0f) : sums[b * Rows + r];
  }
  int64_t d = from;
  for (; d + Dot::kStep <= to; d += Dot::kStep) {
    typename Dot::Row x[Batch];
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) x[b] = Dot::hidden(hidden + d * Batch + b * Dot::kStep);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d);
      // To the second level: a tile ahead is more than the first holds, and has many more fills in flight there.
      if (r < Ahead && (Dot::kStep >= kPerLine || d % kPerLine == 0)) __builtin_prefetch(ahead[r] + d, 0, 2);
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b) sum[r][b] = Dot::step(w, x[b], sum[r][b]);
    }
  }
  if (d < to) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename Dot::Row w = Dot::row(rows[r] + d, static_cast<int>(to - d));
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b)
        sum[r][b] = Dot::step(w, Dot::hidden(hidden + d * Batch + b * Dot::kStep), sum[r][b]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < Batch; ++b) sums[b * Rows + r] = sum[r][b];
  }
}

template <int Rows>
SPECDEC_INLINE void reduce_tile(const Vec* sums, int batch, float* out, int64_t stride) {
  constexpr int kMost = (Rows * kTileBatch + kReduced - 1) / kReduced * kReduced;
  float flat[kMost];
  const int total = Rows * batch;
  for (int i = 0; i < total; i += kReduced) {
    Vec part[kReduced];
#pragma GCC unroll 8
    for (int j = 0; j < kReduced; ++j) part[j] = sums[i + j < total ? i + j : i];
    reduce_add(part, flat + i);
  }
  for (int b = 0; b < batch; ++b) __builtin_memcpy(out + b * stride, flat + b * Rows, sizeof(float) * Rows);
}

template <typename Dot, int Batch>
SPECDEC_INLINE void one_tile(const RowTile<typename Dot::Weight>& tile, const typename Dot::Hidden* hidden, int64_t dim,
                             float* out, int64_t stride) {
  constexpr int kRows = rows_beside(Batch);
  Vec sums[kRows * Batch];
  dot_tile<Dot, kRows, Batch, kRows>(tile.row, tile.ahead, hidden, 0, dim, sums);
  reduce_tile<kRows>(sums, Batch, out, stride);
}

// dot_tile of 1..kTileBatch hidden vectors.
template <typename Dot, int Ahead, typename... Rest>
SPECDEC_INLINE void some_tile(int64_t batch, const Rest&... rest) {
  constexpr int kRows = rows_beside(kTileBatch);
  if (batch == kTileBatch) return dot_tile<Dot, kRows, kTileBatch, Ahead>(rest...);
  if (batch == 1) return dot_tile<Dot, kRows, 1, Ahead>(rest...);
  if (batch == 2) return dot_tile<Dot, kRows, 2, Ahead>(rest...);
  dot_tile<Dot, kRows, 3, Ahead>(rest...);
}

// `multiply` of a Dot that has kStep, row, hidden and step.
template <typename Dot>
void dot_rows(const RowTile<typename Dot::Weight>& tile, const typename Dot::Hidden* hidden, int64_t batch, int64_t dim,
              float* out, int64_t stride) {
  if (batch == 1) return one_tile<Dot, 1>(tile, hidden, dim, out, stride);
  if (batch == 2) return one_tile<Dot, 2>(tile, hidden, dim, out, stride);
  if (batch == 3) return one_tile<Dot, 3>(tile, hidden, dim, out, stride);
  if (batch == kTileBatch) return one_tile<Dot, kTileBatch>(tile, hidden, dim, out, stride);
  constexpr int kRows = rows_beside(kTileBatch);
  constexpr int64_t kPass = kPassTiles * kTileBatch, kStretch = kStretchBytes / sizeof(typename Dot::Weight);
  const int64_t hidden_stride = Dot::hidden_stride(dim);
  Vec sums[kPassTiles][kRows * kTileBatch];
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  for (int64_t first = 0; first < batch; first += kPass) {
    const int64_t last = least(first + kPass, batch);
    for (int64_t from = 0; from == 0 || from < dim; from += kStretch) {
      const int64_t to = least(from + kStretch, dim);
      for (int64_t b = first; b < last; b += kTileBatch) {
        const int64_t size = least(last - b, kTileBatch);
        const auto* x = hidden + b * hidden_stride;
        Vec* kept = sums[(b - first) / kTileBatch];
        // The first two tiles prefetch half of the rows each: all of them at once would hold up what one loads.
        constexpr int kHalf = kRows / 2;
        if (b <= kTileBatch)
          some_tile<Dot, kHalf>(size, tile.row, tile.ahead + (b == 0 ? 0 : kHalf), x, from, to, kept);
        else
          some_tile<Dot, 0>(size, tile.row, tile.ahead, x, from, to, kept);
      }
    }
    for (int64_t b = first; b < last; b += kTileBatch)
      reduce_tile<kRows>(sums[(b - first) / kTileBatch], static_cast<int>(least(last - b, kTileBatch)),
                         out + b * stride, stride);
  }
}

// What is common to Dots whose hidden vectors are one array of numbers, padded with zeros.
template <typename Dot, typename W, typename H>
struct PlainDot {
  using Weight = W;
  using Hidden = H;

  static int64_t hidden_stride(int64_t dim) { return (dim + 31) / 32 * 32; }
  static int tile_rows(int64_t batch) { return rows_beside(static_cast<int>(batch < kTileBatch ? batch : kTileBatch)); }
  // Those of a tile take turns by the step. Apart by a power of two, as they may have come, they would meet in the same
  // sets of the first level with each other and with the rows.
  static void pack(const HeadArgs& args, const HeadRun& run, Hidden* to) {
    const int64_t padded = hidden_stride(args.dim);
    for (int64_t b = 0; b < run.size; ++b) {
      const int64_t tile = b / kTileBatch * kTileBatch;
      const int64_t batch = run.size - tile < kTileBatch ? run.size - tile : kTileBatch;
      Hidden* out = to + tile * padded + (b - tile) * Dot::kStep;
      const auto* from = static_cast<const Weight*>(args.hidden) + (run.first + b) * args.hidden_strides[0];
      for (int64_t step = 0; step < padded; step += Dot::kStep, out += (batch - 1) * Dot::kStep) {
        for (int64_t d = step; d < step + Dot::kStep; ++d, ++out) {
          const Weight* value = from + d * args.hidden_strides[1];
          if constexpr (sizeof(Weight) == sizeof(Hidden))
            *out = d < args.dim ? *value : Hidden{};
          else
            *out = d < args.dim ? load_one(value) : 0.0f;
        }
      }
    }
  }
  static void multiply(const RowTile<Weight>& tile, const Hidden* hidden, int64_t batch, int64_t dim, float* out,
                       int64_t stride) {
    dot_rows<Dot>(tile, hidden, batch, dim, out, stride);
  }
};

// Rows of T, hidden vectors in fp32.
template <typename T>
struct FmaDot : PlainDot<FmaDot<T>, T, float> {
  using Row = Vec;
  static constexpr int kStep = kWidth;

  SPECDEC_INLINE Row row(const T* p) { return load(p); }
  SPECDEC_INLINE Row row(const T* p, int n) { return load(p, n, 0.0f); }
  SPECDEC_INLINE Row hidden(const float* p) { return load(p); }
  SPECDEC_INLINE Vec step(Row w, Row x, Vec sum) { return fma(w, x, sum); }
};

#if defined(SPECDEC_TIER_AVX512BF16)
// Pairs of bf16 products, added in fp32.
struct Bf16Dot : PlainDot<Bf16Dot, Bf16, Bf16> {
  using Row = __m512bh;
  static constexpr int kStep = 32;

  SPECDEC_INLINE Row row(const Bf16* p) { return reinterpret_cast<Row>(_mm512_loadu_si512(p)); }
  SPECDEC_INLINE Row row(const Bf16* p, int n) {
    return reinterpret_cast<Row>(_mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p));
  }
  SPECDEC_INLINE Row hidden(const Bf16* p) { return row(p); }
  SPECDEC_INLINE Vec step(Row w, Row x, Vec sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

}  // namespace specdec::SPECDEC_TIER
