// The online softmax of one block of scores. For tier files only.
//
// Exponentials are powers of two, and a row's reference `most` is a whole number: moving it, and merging partial
// results, multiplies by powers of two and rounds nothing. It moves only when a score passes it by more than kSlack,
// which is rare after the first blocks.
#pragma once

#include "attention_math.h"
#include "simd_math.h"

namespace specdec::SPECDEC_TIER {

constexpr float kNothingSeen = -0x1p127f;  // `most` of a row that has seen no slot
constexpr float kSlack = 6.0f;             // sums stay below 2^6 times their number of slots

// How a score becomes an exponent: x * factor, or after + limit * tanh(x * inner) with a soft cap.
struct ScoreScale {
  float factor;
  float inner, limit;  // limit 0: no cap
};

SPECDEC_INLINE void cap_scores(ScoreScale scale, float* scores, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth)
    store(scores + i, mul(set1(scale.limit), tanh(mul(load(scores + i), set1(scale.inner)))));
}

// Slots in order, one row in each lane. `low` and `high` hold each lane's visible slots as bits; null: all are.
// Leaves weights for the values' product in `weights`, which may be `scores`; `values` [columns][kWidth] moves along.
template <typename Math>
SPECDEC_INLINE void soften_lanes(float* scores, int64_t slots, float factor, const int32_t* low, const int32_t* high,
                                 float* most, float* sum, float* values, int64_t columns, char* weights) {
  Vec top[4];
  for (Vec& t : top) t = set1(-kInf);
  if (low == nullptr) {
    for (int64_t i = 0; i < slots; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) top[j] = max(load(scores + (i + j) * kWidth), top[j]);
  } else {
    for (int64_t i = 0; i < slots; ++i) {
      const Ints bit = iand(iload(i < 32 ? low : high), iset1(uint32_t{1} << (i & 31)));
      const Vec x = select(ieq(bit, iset1(0)), set1(-kInf), load(scores + i * kWidth));
      store(scores + i * kWidth, x);
      top[i & 3] = max(x, top[i & 3]);
    }
  }
  const Vec highest = mul(max(max(top[0], top[1]), max(top[2], top[3])), set1(factor));
  Vec m = load(most), s = load(sum);
  const Mask moves = gt(highest, add(m, set1(kSlack)));
  if (any(moves)) {
    const Vec moved = select(moves, sub(set1(0.0f), floor(sub(set1(0.0f), highest))), m);
    const Vec shrink = exp2(sub(m, moved));
    m = moved;
    s = mul(s, shrink);
    store(most, m);
    for (int64_t d = 0; d < columns; ++d) store(values + d * kWidth, mul(load(values + d * kWidth), shrink));
  }
  const Vec reference = sub(set1(0.0f), m), scale = set1(factor);
  Vec sums[4];
  for (Vec& t : sums) t = set1(0.0f);
  for (int64_t i = 0; i < slots; i += 4) {
    Vec p[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      p[j] = exp2(fma(load(scores + (i + j) * kWidth), scale, reference));
      sums[j] = add(sums[j], p[j]);
    }
    if constexpr (Math::kPack == 1) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(reinterpret_cast<float*>(weights) + (i + j) * kWidth, p[j]);
    } else {
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2)
        store(reinterpret_cast<float*>(weights) + (i + j) / 2 * kWidth, as_floats(Math::pair(p[j], p[j + 1])));
    }
  }
  store(sum, add(s, add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
}

// One row, its slots side by side; `seen` holds the visible ones.
template <typename Math>
SPECDEC_INLINE void soften_row(float* scores, int64_t slots, float factor, uint64_t seen, float* most, float* sum,
                               float* values, int64_t columns, typename Math::Element* weights) {
  Vec top = set1(-kInf);
  for (int64_t i = 0; i < slots; i += kWidth) {
    const Vec x = select(mask_of(static_cast<uint32_t>(seen >> i)), load(scores + i), set1(-kInf));
    store(scores + i, x);
    top = max(x, top);
  }
  const float highest = reduce_max(top) * factor;
  if (highest > *most + kSlack) {
    const float moved = -__builtin_floorf(-highest);
    float shrink[kWidth];
    store(shrink, exp2(set1(*most - moved)));
    *most = moved;
    *sum *= shrink[0];
    for (int64_t d = 0; d < columns; d += kWidth) store(values + d, mul(load(values + d), set1(shrink[0])));
  }
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < slots; i += kWidth) {
    const Vec p = exp2(fma(load(scores + i), set1(factor), set1(-*most)));
    total = add(total, p);
    if constexpr (Math::kPack == 1)
      store(weights + i, p);
    else
      store(weights + i, p, kWidth);
  }
  *sum += reduce_add(total);
}

}  // namespace specdec::SPECDEC_TIER
