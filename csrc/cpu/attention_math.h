// Products of attention with rows in lanes: one micro-kernel for scores and for values. For tier files only.
#pragma once

#include "attention.h"
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

struct View {
  const char* data;
  int64_t stride;  // bytes from one slot to the next
};

// Rows of the next block, which are fetched into the second level cache while this one is worked on, little by little:
// the first level could not hold them, and whoever waits for memory and then computes is half as fast.
class Ahead {
 public:
  Ahead() = default;
  Ahead(View rows, int64_t bytes) : at_(rows.data), end_(rows.data + bytes), stride_(rows.stride), bytes_(bytes) {}

  explicit operator bool() const { return at_ != nullptr; }
  void inline __attribute__((always_inline)) fetch() {
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
    if (at_ >= end_) {
      end_ += stride_;
      at_ = end_ - bytes_;
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0;
};

// What is fetched in step k of a tile of `Rows` rows: of rows that are whole lines all of a block, once all tiles have
// been.
struct FetchNothing {
  void inline __attribute__((always_inline)) operator()(int64_t) {}
};
template <int Rows>
struct FetchAhead {
  Ahead ahead;
  void inline __attribute__((always_inline)) operator()(int64_t k) {
    if ((k & (16 / Rows - 1)) == 0) ahead.fetch();
  }
};

// What becomes of a finished sum: scores are new, values join what the blocks before have left, which `shrink` brings
// to the softmax's new reference, with a factor for each lane.
struct NewSums {
  static constexpr bool kIsLong = true;
  Vec inline __attribute__((always_inline)) operator()(Vec sum, const float*, int) const { return sum; }
};
struct JoinLanes {
  static constexpr bool kIsLong = false;  // not longer than a block
  const float* shrink;
  Vec inline __attribute__((always_inline)) operator()(Vec sum, const float* old, int vector) const {
    return fma(load(old), load(shrink + vector * kWidth), sum);
  }
};

// Long sums are taken of this many terms at a time, and then added: one chain would lose digits that others keep.
template <typename Math>
constexpr int64_t kChain = 32 * Math::kPack;

// sums[i, v] = join(sum over k of word (i, k) of `a`, spread over the lanes, times vector (v, k) of `b`).
template <typename Math, int Rows, int Vectors, typename Join, typename Fetch>
SPECDEC_INLINE void multiply_tile(Words a, Words b, int64_t steps, float* sums, int64_t row, int64_t vector, Join join,
                                  Fetch& fetch) {
  // Rows that lie apart by 1, 2 and 3 times a stride are addresses of one register, which is hidden from the compiler
  // each time it moves on: it would keep a pointer for every row, most of them out of registers.
  constexpr int kBeside = 4, kBases = Rows / kBeside;
  static_assert(Rows % kBeside == 0);
  int64_t from = 0;
  do {
    Vec acc[Rows][Vectors];
    for (auto& sums_of_row : acc)
      for (Vec& sum : sums_of_row) sum = set1(0.0f);
    const int64_t to = Join::kIsLong && from + kChain<Math> < steps ? from + kChain<Math> : steps;
    const char* base[kBases];
    for (int i = 0; i < kBases; ++i) base[i] = a.data + i * kBeside * a.row + from * a.step;
    for (int64_t k = from; k < to; ++k) {
      fetch(k);
      decltype(Math::words(b.data)) x[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) x[v] = Math::words(b.data + v * b.row + k * b.step);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const auto w = Math::spread(base[i / kBeside] + i % kBeside * a.row);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[i][v] = Math::step(w, x[v], acc[i][v]);
      }
#pragma GCC unroll 16
      for (const char*& p : base) {
        p += a.step;
        __asm__("" : "+r"(p));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* sum = sums + i * row + v * vector;
        store(sum, from == 0 ? join(acc[i][v], sum, v) : add(acc[i][v], load(sum)));
      }
    from = to;
  } while (Join::kIsLong && from < steps);
}

// The same for any multiple of kTileSums / Vectors rows; 16 sums fill the registers of AVX-512, 8 those of AVX2.
constexpr int kTileSums = kWidth == 16 ? 16 : 8;
// Not inlined: among what else a job keeps in registers, the addresses of the inner loop would have to leave them.
template <typename Math, int Vectors, typename Join, typename Fetch>
__attribute__((noinline)) void multiply(Words a, Words b, int64_t rows, int64_t steps, float* sums, int64_t row,
                                        int64_t vector, Join join, Fetch fetch) {
  constexpr int kRows = kTileSums / Vectors;
  for (int64_t i = 0; i < rows; i += kRows)
    multiply_tile<Math, kRows, Vectors>({a.data + i * a.row, a.row, a.step}, b, steps, sums + i * row, row, vector,
                                        join, fetch);
}

}  // namespace specdec::SPECDEC_TIER
