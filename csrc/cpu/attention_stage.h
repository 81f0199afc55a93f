// A block of cached slots as the kernels read it: where it lies if it fits, else copied, converted and padded. For tier
// files only.
#pragma once

#include "attention.h"
#include "attention_math.h"

namespace specdec::SPECDEC_TIER {

struct E4m3 {
  uint8_t bits;
};
struct E5m2 {
  uint8_t bits;
};
struct Int8 {
  uint8_t bits;
};

// Eight bits as fp32, exactly. Shifted into place they have their own exponent's bias, which a product takes away,
// from subnormal numbers as well.
SPECDEC_INLINE Vec load(const E4m3* p, int n, float) {
  const Ints raw = bytes(&p->bits, n), size = iand(raw, iset1(0x7Fu)), sign = shift_left(ixor(raw, size), 24);
  const Ints x = as_ints(mul(as_floats(shift_left(size, 20)), set1(0x1p120f)));
  return as_floats(ixor(iselect(ieq(size, iset1(0x7Fu)), iset1(0x7FC00000u), x), sign));
}
SPECDEC_INLINE Vec load(const E5m2* p, int n, float) {
  const Ints raw = bytes(&p->bits, n), size = iand(raw, iset1(0x7Fu)), sign = shift_left(ixor(raw, size), 24);
  const Ints x = as_ints(mul(as_floats(shift_left(size, 21)), set1(0x1p112f)));
  const Mask special = ieq(iand(size, iset1(0x7Cu)), iset1(0x7Cu));  // inf, NaN
  return as_floats(ixor(iselect(special, ixor(shift_left(size, 21), iset1(0x70000000u)), x), sign));
}
SPECDEC_INLINE Vec load(const Int8* p, int n, float) {
  return sub(to_floats(ixor(bytes(&p->bits, n), iset1(0x80u))), set1(128.0f));
}

template <typename F>
SPECDEC_INLINE void with_cache_type(CacheType type, F&& f) {
  switch (type) {
    case CacheType::kFloat:
      return f(static_cast<const float*>(nullptr));
    case CacheType::kBf16:
      return f(static_cast<const Bf16*>(nullptr));
    case CacheType::kHalf:
      return f(static_cast<const Half*>(nullptr));
    case CacheType::kE4m3:
      return f(static_cast<const E4m3*>(nullptr));
    case CacheType::kE5m2:
      return f(static_cast<const E5m2*>(nullptr));
    case CacheType::kInt8:
      return f(static_cast<const Int8*>(nullptr));
  }
}

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Element index of a slot's first column.
SPECDEC_INLINE int64_t slot_start(const AttentionArgs& args, const AttentionJob& job, const AttentionCache& cache,
                                  int64_t slot) {
  int64_t outer = job.source;
  if (args.table != nullptr) {
    // Bounds hold for any table; whether it makes sense is checked under SPECDEC_DEBUG.
    const int64_t page = args.table[job.source * args.table_width + slot / args.page];
    outer = page < 0 ? 0 : page < args.pages ? page : args.pages - 1;
    slot %= args.page;
  }
  return outer * cache.outer + job.at.kv_head * cache.head + slot * cache.slot;
}

SPECDEC_INLINE void put(float* to, Vec x) { store(to, x); }
SPECDEC_INLINE void put(Bf16* to, Vec x) { store(to, x, kWidth); }

// `columns` elements, then zeros up to `padded`, a multiple of kWidth.
template <typename T, typename Element>
SPECDEC_INLINE void convert_row(const T* from, int64_t step, int64_t columns, Element* to, int64_t padded) {
  if constexpr (kSame<T, Element>) {
    if (step == 1) {
      __builtin_memcpy(to, from, columns * sizeof(T));
      __builtin_memset(to + columns, 0, (padded - columns) * sizeof(T));
      return;
    }
  }
  for (int64_t d = 0; d < padded; d += kWidth) {
    const int n = static_cast<int>(columns - d < kWidth ? (columns > d ? columns - d : 0) : kWidth);
    T gathered[kWidth] = {};
    for (int i = 0; i < n && step != 1; ++i) gathered[i] = from[(d + i) * step];
    put(to + d, n == 0 ? set1(0.0f) : load(step == 1 ? from + d : gathered, n, 0.0f));
  }
}

// Copies the first `slots` of the block at `start`: those of `seen`, and zeros for the others, which are not read.
template <typename Element>
void stage_block(const AttentionArgs& args, const AttentionJob& job, const AttentionCache& cache, int64_t start,
                 int64_t slots, uint64_t seen, Element* to, int64_t padded) {
  with_cache_type(args.cache_type, [&](auto tag) {
    for (int64_t i = 0; i < slots; ++i, to += padded) {
      if ((seen >> i & 1) == 0) {
        __builtin_memset(to, 0, padded * sizeof(Element));
        continue;
      }
      const auto from = static_cast<decltype(tag)>(cache.data) + slot_start(args, job, cache, start + i);
      convert_row(from, cache.column, cache.columns, to, padded);
    }
  });
}

// Sets elements that are not finite to 0, in the rows of `slots`; the slots that have some.
template <typename Element>
uint64_t take_out_broken(Element* rows, int64_t padded, uint64_t slots) {
  uint64_t broken = 0;
  for (; slots != 0; slots &= slots - 1) {
    const int i = __builtin_ctzll(slots);
    Element* row = rows + i * padded;
    for (int64_t d = 0; d < padded; d += kWidth) {
      const Vec x = load(row + d), zero = set1(0.0f);
      const Mask sound = gt(set1(kInf), max(x, sub(zero, x)));
      if (bits(sound) == bits(eq(zero, zero))) continue;
      put(row + d, select(sound, x, zero));
      broken |= uint64_t{1} << i;
    }
  }
  return broken;
}

// A whole block that lies as the kernels want it: their element type, columns side by side, one stride.
template <typename Element>
SPECDEC_INLINE bool lies_ready(const AttentionArgs& args, const AttentionCache& cache) {
  const CacheType wanted = kSame<Element, float> ? CacheType::kFloat : CacheType::kBf16;
  return args.cache_type == wanted && (cache.column == 1 || cache.columns == 1) &&
         (args.table == nullptr || args.page % kAttentionBlock == 0);
}

#if defined(SPECDEC_TIER_AVX512BF16)
// What puts the elements of two slots side by side in a word for each column: those of the first and of the last 16
// columns of 32.
struct PairOrder {
  __m512i low, high;

  PairOrder() {
    low = _mm512_add_epi32(_mm512_mullo_epi32(iota(), iset1(0x10001u)), iset1(0x200000u));
    high = _mm512_add_epi32(low, iset1(0x100010u));
  }
};

SPECDEC_INLINE __mmask32 some_columns(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n > 0 ? (__mmask32{1} << n) - 1 : 0;
}

// [slot / 2][padded], in pairs.
SPECDEC_INLINE void pack_pairs(View rows, int64_t slots, int64_t columns, char* to, int64_t padded) {
  const PairOrder order;
  for (int64_t i = 0; i < slots; i += 2, to += padded * 4) {
    const char *a = rows.data + i * rows.stride, *b = a + rows.stride;
    for (int64_t d = 0; d < padded; d += 32) {
      const __mmask32 some = some_columns(columns - d);
      const __m512i x = _mm512_maskz_loadu_epi16(some, a + 2 * d), y = _mm512_maskz_loadu_epi16(some, b + 2 * d);
      _mm512_storeu_si512(to + 4 * d, _mm512_permutex2var_epi16(x, order.low, y));
      if (d + 16 < padded) _mm512_storeu_si512(to + 4 * d + 64, _mm512_permutex2var_epi16(x, order.high, y));
    }
  }
}
#endif

}  // namespace specdec::SPECDEC_TIER
