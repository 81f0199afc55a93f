// Products of attention: one micro-kernel for scores and for values, and dot products for a few rows. For tier files.
#pragma once

#include "simd.h"

namespace specdec::SPECDEC_TIER {

// A kernel's elements come in words of 32 bits: what one lane multiplies in one step.
struct FloatMath {
  using Element = float;
  static constexpr int kPack = 1;       // elements of a word
  static constexpr int kStep = kWidth;  // elements of a register

  SPECDEC_INLINE Vec spread(const char* word) {
    float x;
    __builtin_memcpy(&x, word, sizeof x);
    return set1(x);
  }
  SPECDEC_INLINE Vec words(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  SPECDEC_INLINE Vec words(const char* p, int elements) {
    return load(reinterpret_cast<const float*>(p), elements, 0.0f);
  }
  SPECDEC_INLINE Vec step(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(SPECDEC_TIER_AVX512BF16)
struct Bf16Math {
  using Element = Bf16;
  static constexpr int kPack = 2;
  static constexpr int kStep = 32;

  SPECDEC_INLINE __m512bh spread(const char* word) {
    uint32_t x;
    __builtin_memcpy(&x, word, sizeof x);
    return reinterpret_cast<__m512bh>(iset1(x));
  }
  SPECDEC_INLINE __m512bh words(const char* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  SPECDEC_INLINE __m512bh words(const char* p, int elements) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((uint32_t{1} << elements) - 1, p));
  }
  SPECDEC_INLINE Vec step(__m512bh a, __m512bh b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
  // Lane i of `even` and of `odd`, rounded, side by side in word i.
  SPECDEC_INLINE Ints pair(Vec even, Vec odd) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(iota(), iset1(0x10001u)), iset1(0x100000u));
    return _mm512_permutexvar_epi16(order, halves);
  }
};
#endif

// Where a micro-kernel finds a word and where it goes on, in bytes.
struct Words {
  const char* data;
  int64_t row;   // to the next row (of what is spread) or the next vector (of what is not)
  int64_t step;  // to the next term of the sum
};

// Rows of the next block, which are fetched into the second level cache while this one is worked on, little by little:
// the first level could not hold them, and whoever waits for memory and then computes is half as fast.
struct Ahead {
  const char* data;  // null: there is nothing to fetch
  int64_t stride;

  void inline __attribute__((always_inline)) fetch(int64_t row, int64_t line) const {
    __builtin_prefetch(data + row * stride + line * 64, 0, 2);
  }
};

// What a tile of Rows rows fetches in each of its steps: `tile(i)` is asked once, with the tile's first row.
struct FetchNothing {
  struct Tile {
    void inline __attribute__((always_inline)) operator()(int64_t) const {}
  };
  Tile tile(int64_t) const { return {}; }
};
// For rows that are slots. A row has a line for every 16 words: the tile's rows take turns, a line of each.
template <int Rows>
struct FetchRows {
  Ahead ahead;

  struct Tile {
    Ahead ahead;
    void inline __attribute__((always_inline)) operator()(int64_t k) const { ahead.fetch(k % 16 * Rows / 16, k / 16); }
  };
  Tile tile(int64_t i) const { return {{ahead.data + i * ahead.stride, ahead.stride}}; }
};
// For rows that are columns, where `steps` walk the slots: 16 rows for each of which a line of some slots is fetched.
template <int Rows>
struct FetchColumns {
  Ahead ahead;
  int64_t steps, slots;

  struct Tile {
    Ahead ahead;
    void inline __attribute__((always_inline)) operator()(int64_t k) const { ahead.fetch(k * Rows / 16, 0); }
  };
  Tile tile(int64_t i) const {
    const int64_t before = i * steps / 16;
    return {{ahead.data + before % slots * ahead.stride + before / slots * 64, ahead.stride}};
  }
};

// What becomes of a finished sum: scores are new, values join what the blocks before have left, which `shrink` brings
// to the softmax's new reference. One factor for each lane of a vector, or one for each row.
struct NewSums {
  static constexpr bool kIsLong = true;
  Vec inline __attribute__((always_inline)) operator()(Vec sum, const float*, int64_t, int) const { return sum; }
};
struct JoinLanes {
  static constexpr bool kIsLong = false;  // not longer than a block
  const float* shrink;
  Vec inline __attribute__((always_inline)) operator()(Vec sum, const float* old, int64_t, int vector) const {
    return fma(load(old), load(shrink + vector * kWidth), sum);
  }
};
struct JoinRows {
  static constexpr bool kIsLong = false;
  const float* shrink;
  Vec inline __attribute__((always_inline)) operator()(Vec sum, const float* old, int64_t row, int) const {
    return fma(load(old), set1(shrink[row]), sum);
  }
};

// Long sums are taken of this many terms at a time, and then added: one chain would lose digits that others keep.
template <typename Math>
constexpr int64_t kChain = 32 * Math::kPack;

// sums[i, v] = join(sum over k of word (i, k) of `a`, spread over the lanes, times vector (v, k) of `b`).
template <typename Math, int Rows, int Vectors, typename Join, typename FetchTile>
SPECDEC_INLINE void multiply_tile(Words a, Words b, int64_t steps, float* sums, int64_t row, int64_t vector, Join join,
                                  FetchTile fetch) {
  int64_t from = 0;
  do {
    Vec acc[Rows][Vectors];
    for (auto& sums_of_row : acc)
      for (Vec& sum : sums_of_row) sum = set1(0.0f);
    const int64_t to = Join::kIsLong && from + kChain<Math> < steps ? from + kChain<Math> : steps;
    for (int64_t k = from; k < to; ++k) {
      fetch(k);
      decltype(Math::words(b.data)) x[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) x[v] = Math::words(b.data + v * b.row + k * b.step);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const auto w = Math::spread(a.data + i * a.row + k * a.step);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[i][v] = Math::step(w, x[v], acc[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* sum = sums + i * row + v * vector;
        store(sum, from == 0 ? join(acc[i][v], sum, i, v) : add(acc[i][v], load(sum)));
      }
    from = to;
  } while (Join::kIsLong && from < steps);
}

// The same for any multiple of kTileSums / Vectors rows; 16 sums fill the registers of AVX-512, 8 those of AVX2.
constexpr int kTileSums = kWidth == 16 ? 16 : 8;
template <typename Math, int Vectors, typename Join, typename Fetch>
SPECDEC_INLINE void multiply(Words a, Words b, int64_t rows, int64_t steps, float* sums, int64_t row, int64_t vector,
                             Join join, Fetch fetch) {
  constexpr int kRows = kTileSums / Vectors;
  for (int64_t i = 0; i < rows; i += kRows)
    multiply_tile<Math, kRows, Vectors>({a.data + i * a.row, a.row, a.step}, b, steps, sums + i * row, row, vector,
                                        join, fetch.tile(i));
}

// scores[r * kAttentionBlock + i] = key i . query r, for a number of keys that kWidth divides. `query` is padded with
// zeros to whole registers, the keys are not.
template <typename Math, int Rows>
SPECDEC_INLINE void dot_rows(const char* keys, int64_t stride, int64_t count, const char* query, int64_t query_stride,
                             int64_t dim, float* scores, Ahead ahead) {
  constexpr int kKeys = kWidth / Rows > 0 ? kWidth / Rows : 1;
  constexpr int64_t kBytes = Math::kStep * static_cast<int64_t>(sizeof(typename Math::Element));
  const int rest = static_cast<int>(dim % Math::kStep);
  for (int64_t i = 0; i < count; i += kKeys, keys += kKeys * stride) {
    Vec acc[Rows * kKeys];
    for (Vec& sum : acc) sum = set1(0.0f);
    int64_t d = 0;
    const auto add_products = [&](auto load_key) __attribute__((always_inline)) {
      decltype(Math::words(query)) x[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) x[r] = Math::words(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const auto key = load_key(keys + j * stride + d);
        if (ahead.data != nullptr && d % 64 == 0) ahead.fetch(i + j, d / 64);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) acc[r * kKeys + j] = Math::step(key, x[r], acc[r * kKeys + j]);
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

}  // namespace specdec::SPECDEC_TIER
