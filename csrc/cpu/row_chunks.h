// A row of logits in chunks that stay in the nearest cache, as the kernels read it: mixed, masked and cut. For tier
// files only.
#pragma once

#include "simd.h"
#include "verify.h"

namespace specdec::SPECDEC_TIER {

constexpr int kChunk = 512;
constexpr int kWords = kChunk / 32;
static_assert(kBlock % kChunk == 0 && kChunk % 32 == 0, "masks are read by whole words");

SPECDEC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x for x <= 0 to 1.5e-7, 0 below -150, NaN stays NaN.
SPECDEC_INLINE Vec exp2(Vec x) {
  x = max(set1(-200.0f), x);
  const Vec n = round(x), f = sub(x, n);
  Vec p = set1(0x1.5bba0ep-10f);
  p = fma(p, f, set1(0x1.3cea88p-7f));
  p = fma(p, f, set1(0x1.c6b752p-5f));
  p = fma(p, f, set1(0x1.ebf9bcp-3f));
  p = fma(p, f, set1(0x1.62e42ap-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// Lane i is true iff bit i is set.
SPECDEC_INLINE Mask lanes(uint32_t word) {
  alignas(64) static const int32_t kBits[16] = {1,      2,      4,       8,       1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const Ints bits = iload(kBits);
  return ieq(iand(iset1(word), bits), bits);
}

// The first of `count` ascending ids that is not below `id`.
SPECDEC_INLINE int64_t lower_bound(const int32_t* ids, int64_t count, int64_t id) {
  const int32_t* at = ids;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool below = at[half] < id;
    at = below ? at + half + 1 : at;
    count = below ? count - half - 1 : half;
  }
  return at - ids;
}

// At most kChunk columns of a row side by side.
template <typename T>
struct Chunk {
  const T* logits;
  const uint32_t* allowed;  // by column from the chunk's first on, null: all are allowed
  float cut;
  int64_t column;  // the first
  int size;
};

// What a chunk that is not read in place is gathered into.
struct ChunkBuffer {
  alignas(64) float mixed[kChunk];
  uint32_t allowed[kWords];
};

// body(i, x) for each vector of a chunk, -inf where a column is not there or not kept(i, x).
template <typename T, typename Kept, typename Body>
SPECDEC_INLINE void each_kept(const Chunk<T>& chunk, Kept kept, Body body) {
  const T* logits = chunk.logits;
  const int n = chunk.size;
  for (int i = 0; i < n; i += kWidth) {
    const Vec x = i + kWidth <= n ? load(logits + i) : load(logits + i, n - i, -kInf);
    body(i, select(kept(i, x), x, set1(-kInf)));
  }
}

// body(i, x) for each vector of a chunk, -inf where a column is not there, not allowed or cut off.
template <typename T, typename Body>
SPECDEC_INLINE void each(const Chunk<T>& chunk, Body body) {
  const uint32_t* words = chunk.allowed;
  const auto allowed = [&](int i) { return lanes(words[i >> 5] >> (i & 31)); };
  const auto above = [&](Vec x) { return not_lt(x, set1(chunk.cut)); };
  if (chunk.cut > -kInf) {
    if (words != nullptr)
      each_kept(chunk, [&](int i, Vec x) { return both(allowed(i), above(x)); }, body);
    else
      each_kept(chunk, [&](int, Vec x) { return above(x); }, body);
  } else if (words != nullptr) {
    each_kept(chunk, [&](int i, Vec) { return allowed(i); }, body);
  } else {
    const int n = chunk.size;
    int i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, load(chunk.logits + i));
    if (i < n) body(i, load(chunk.logits + i, n - i, -kInf));
  }
}

// A trimmed row's bits of `n` columns from `column` on, gathered from those of their ids.
inline void gather_allowed(const LogitRow& row, int64_t column, int n, uint32_t* out) {
  for (int w = 0; w < kWords; ++w) out[w] = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t id = row.ids[column + i];
    if (id < 0 || id >= row.vocabulary) continue;
    out[i >> 5] |= ((row.allowed[id >> 5] >> (id & 31)) & 1u) << (i & 31);
  }
}

// The mask of `n` columns from `column` on, by column; null if all are allowed. `column` is a multiple of 32 where the
// row is not trimmed.
SPECDEC_INLINE const uint32_t* allowed_columns(const LogitRow& row, int64_t column, int n, uint32_t* buffer) {
  const uint32_t* allowed = nullptr;
  if (row.allowed != nullptr && row.ids == nullptr) {
    allowed = row.allowed + column / 32;
  } else if (row.allowed != nullptr) {
    gather_allowed(row, column, n, buffer);
    allowed = buffer;
  }
  if (row.num_excluded == 0) return allowed;
  const int64_t end = column + n;
  int64_t next = lower_bound(row.excluded, row.num_excluded, column);
  if (next == row.num_excluded || row.excluded[next] >= end) return allowed;
  for (int w = 0; w < (n + 31) / 32; ++w) buffer[w] = allowed != nullptr ? allowed[w] : ~0u;
  for (; next < row.num_excluded && row.excluded[next] < end; ++next) {
    const int64_t i = row.excluded[next] - column;
    buffer[i >> 5] &= ~(1u << (i & 31));
  }
  return buffer;
}

// Two rows as one, every operation rounded by itself; up to a whole vector is written past the last.
template <typename T>
inline void mix(const LogitRow& row, int64_t column, int n, const T*, float* out) {
  const T* a = static_cast<const T*>(row.logits) + column;
  const T* b = static_cast<const T*>(row.mixed) + column;
  const Vec keep = set1(1.0f - row.mix), weight = set1(row.mix);
  for (int i = 0; i < n; i += kWidth) {
    const bool whole = i + kWidth <= n;
    const Vec x = whole ? load(a + i) : load(a + i, n - i, 0.0f), y = whole ? load(b + i) : load(b + i, n - i, 0.0f);
    store(out + i, add(mul(keep, x), mul(weight, y)));
  }
}

// The logits of a row whose type is T. Only fp32 can be mixed: with_logits() says so of a mixed row of any type.
template <typename T>
SPECDEC_INLINE const T* logits_at(const LogitRow& row, int64_t column, int, const T*, float*) {
  return static_cast<const T*>(row.logits) + column;
}
SPECDEC_INLINE const float* logits_at(const LogitRow& row, int64_t column, int n, const float*, float* buffer) {
  if (row.mixed == nullptr) return static_cast<const float*>(row.logits) + column;
  with_dtype(row.type, [&](auto tag) { mix(row, column, n, tag, buffer); });
  return buffer;
}

// f(null pointer of the type in which a row's chunks come).
template <typename F>
SPECDEC_INLINE void with_logits(const LogitRow& row, F&& f) {
  with_dtype(row.mixed != nullptr ? DType::kFloat : row.type, f);
}

// `size` <= kChunk columns from `column` on.
template <typename T>
SPECDEC_INLINE Chunk<T> chunk_at(const LogitRow& row, int64_t column, int size, const T* tag, ChunkBuffer* buffer) {
  const T* logits = logits_at(row, column, size, tag, buffer->mixed);
  return {logits, allowed_columns(row, column, size, buffer->allowed), row.cut, column, size};
}

// body(chunk) for each chunk of a block of a row's columns.
template <typename Body>
SPECDEC_INLINE void each_chunk(const LogitRow& row, int64_t block, Body body) {
  ChunkBuffer buffer;
  const int64_t end = least((block + 1) * kBlock, row.columns);
  with_logits(row, [&](auto tag) {
    for (int64_t column = block * kBlock; column < end; column += kChunk)
      body(chunk_at(row, column, static_cast<int>(least(kChunk, end - column)), tag, &buffer));
  });
}

// Probabilities of `n` <= kChunk columns from `column` on; up to a whole vector is written past the last.
inline void probabilities(const LogitRow& row, const Softmax& softmax, int64_t column, int n, float* out) {
  ChunkBuffer buffer;
  const Vec peak = set1(softmax.peak), slope = set1(softmax.slope), scale = set1(softmax.scale);
  with_logits(row, [&](auto tag) {
    each(chunk_at(row, column, n, tag, &buffer),
         [&](int i, Vec x) { store(out + i, mul(exp2(mul(sub(x, peak), slope)), scale)); });
  });
}

}  // namespace specdec::SPECDEC_TIER
