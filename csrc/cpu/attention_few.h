// Products of attention for a few rows, which would leave most lanes of a set empty: slots and columns are in the
// lanes. For tier files only.
#pragma once

#include "attention_stage.h"

namespace specdec::SPECDEC_TIER {

// scores[r * kAttentionBlock + i] = key i . query r, for a number of keys that kWidth divides. `query` is
// padded with zeros to whole registers, the keys are not.
template <typename Math, int Rows>
SPECDEC_INLINE void dot_rows(View keys, int64_t count, const char* query, int64_t query_stride, int64_t dim,
                             float* scores, Ahead& ahead) {
  constexpr int kKeys = kWidth / Rows > 0 ? kWidth / Rows : 1;
  constexpr int64_t kBytes = Math::kStep * static_cast<int64_t>(sizeof(typename Math::Element));
  const int rest = static_cast<int>(dim % Math::kStep);
  for (int64_t i = 0; i < count; i += kKeys) {
    Vec acc[Rows * kKeys];
    for (Vec& sum : acc) sum = set1(0.0f);
    const char* key[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) key[j] = keys.data + (i + j) * keys.stride;
    int64_t d = 0;
    const auto add_products = [&](auto load_key) __attribute__((always_inline)) {
      decltype(Math::words(query)) x[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) x[r] = Math::words(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const auto k = load_key(key[j] + d);
        if (ahead && d % 64 == 0) ahead.fetch();
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) acc[r * kKeys + j] = Math::step(k, x[r], acc[r * kKeys + j]);
      }
    };
    for (int64_t n = dim / Math::kStep; n > 0; --n, d += kBytes)
      add_products([](const char* p) { return Math::words(p); });
    if (rest != 0) add_products([&](const char* p) { return Math::words(p, rest); });
    float sums[kWidth];
    store(sums, sums_of(acc));
    for (int r = 0; r < Rows; ++r)
      __builtin_memcpy(scores + r * kAttentionBlock + i, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// Vectors of the values of one word's slots, which begin at `rows[0]` and, if there are two, `rows[1]`. Of bf16 the
// elements of two slots come side by side, in pairs of vectors.
template <typename Math>
struct SlotColumns {
  template <int Vectors>
  SPECDEC_INLINE void load_columns(const char* const* rows, int64_t, Vec* x) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x[v] = Math::words(rows[0] + v * kWidth * 4);
  }
};
#if defined(SPECDEC_TIER_AVX512BF16)
template <>
struct SlotColumns<Bf16Math> {
  const PairOrder order;

  template <int Vectors>
  inline __attribute__((always_inline)) void load_columns(const char* const* rows, int64_t columns, __m512bh* x) const {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v += 2) {
      const __mmask32 some = some_columns(columns - 16 * v);
      const __m512i a = _mm512_maskz_loadu_epi16(some, rows[0] + 32 * v);
      const __m512i b = _mm512_maskz_loadu_epi16(some, rows[1] + 32 * v);
      x[v] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, order.low, b));
      x[v + 1] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, order.high, b));
    }
  }
};
#endif

// values[r, d] = values[r, d] * shrink[r] + sum over i of weight (r, i) * row (i, d), for Vectors vectors of
// columns from `rows` on, of which there are `columns`: any number in bf16, else whole vectors. Rows of `values` are
// padded to 16.
template <typename Math, int Rows, int Vectors>
SPECDEC_INLINE void add_columns(const typename Math::Element* weights, View rows, int64_t slots, int64_t columns,
                                const float* shrink, float* values, int64_t value_columns, Ahead& ahead) {
  constexpr int kLines = Vectors * kWidth > 16 ? Vectors * kWidth / 16 : 1;
  const SlotColumns<Math> block;
  Vec acc[Rows][Vectors];
  for (auto& row : acc)
    for (Vec& sum : row) sum = set1(0.0f);
  for (int64_t i = 0; i < slots; i += Math::kPack) {
    // As much as is read of this block.
    for (int j = 0; j < kLines && ahead; ++j) ahead.fetch();
    const char* at[Math::kPack];
    for (int j = 0; j < Math::kPack; ++j) at[j] = rows.data + (i + j) * rows.stride;
    decltype(Math::words(at[0])) x[Vectors];
    block.template load_columns<Vectors>(at, columns, x);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const auto w = Math::spread(reinterpret_cast<const char*>(weights + r * kAttentionBlock + i));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[r][v] = Math::step(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* sum = values + r * value_columns + v * kWidth;
      // A branch here would keep sums in memory.
      store(sum, fma(load(sum), set1(shrink[r]), acc[r][v]), columns > v * kWidth ? kWidth : 0);
    }
}

}  // namespace specdec::SPECDEC_TIER
