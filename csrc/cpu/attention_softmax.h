// The online softmax of one block of scores. For tier files only.
//
// Exponentials are powers of two, relative to a reference of each row: `most`. In fp32 that is a whole number, so that
// moving it and merging partial results multiply by powers of two and round nothing. Weights that become bf16 are
// relative to the largest score itself: the largest weight is 1 then and rounds to itself.
#pragma once

#include "attention_math.h"
#include "simd_math.h"

namespace specdec::SPECDEC_TIER {

constexpr double kLog2E = 0x1.71547652b82fep0;
constexpr float kNothingSeen = -0x1p127f;  // `most` of a row that has seen no slot

// How a score becomes an exponent: x * factor, or after + limit * tanh(x * inner) with a soft cap.
struct ScoreScale {
  float factor;
  float inner, limit;  // limit 0: no cap
};

SPECDEC_INLINE void cap_scores(ScoreScale scale, float* scores, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth)
    store(scores + i, mul(set1(scale.limit), tanh(mul(load(scores + i), set1(scale.inner)))));
}

// 2^x to 3e-6, for weights that are rounded to bf16; 2^-126 for whatever is below, NaN stays NaN. Half of it runs on
// units that the products leave idle.
SPECDEC_INLINE Vec exp2_for_halves(Vec x) {
  x = max(set1(-126.0f), x);
  const Vec n = add(x, set1(0x1.8p23f));  // the whole number nearest to x stands in its lowest bits
  const Vec f = sub(x, sub(n, set1(0x1.8p23f)));
  // Minimax polynomial of (2^f - 1) / f on [-1/2, 1/2].
  Vec p = set1(0x1.3a02ccp-7f);
  p = fma(p, f, set1(0x1.c9fc46p-5f));
  p = fma(p, f, set1(0x1.ec0378p-3f));
  p = fma(p, f, set1(0x1.62e12cp-1f));
  p = fma(p, f, set1(1.0f));
  return as_floats(iadd(as_ints(p), shift_left(as_ints(n), 23)));
}

// The lanes that do not see slot i, of which `low` and `high` have the bits.
SPECDEC_INLINE Mask hidden(const int32_t* low, const int32_t* high, int64_t i) {
  return ieq(iand(iload(i < 32 ? low : high), iset1(uint32_t{1} << (i & 31))), iset1(0));
}

template <typename Math>
SPECDEC_INLINE Vec reference_of(Vec highest) {
  return Math::kPack == 1 ? sub(set1(0.0f), floor(sub(set1(0.0f), highest))) : highest;
}

// Slots in order, one row in each lane. `low` and `high` hold each lane's visible slots as bits; null: all are. Leaves
// weights for the values' product in `weights`, which may be `scores`, and in `shrink` what becomes of earlier values.
template <typename Math>
SPECDEC_INLINE void soften_lanes(float* scores, int64_t slots, float factor, const int32_t* low, const int32_t* high,
                                 float* most, float* sum, float* shrink, char* weights) {
  Vec top[4];
  for (Vec& t : top) t = set1(-kInf);
  if (low == nullptr) {
    for (int64_t i = 0; i < slots; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) top[j] = max(load(scores + (i + j) * kWidth), top[j]);
  } else {
    for (int64_t i = 0; i < slots; ++i) {
      const Vec x = select(hidden(low, high, i), set1(-kInf), load(scores + i * kWidth));
      store(scores + i * kWidth, x);
      top[i & 3] = max(x, top[i & 3]);
    }
  }
  const Vec scale = set1(factor), highest = mul(max(max(top[0], top[1]), max(top[2], top[3])), scale);
  const Vec before = load(most), m = max(reference_of<Math>(highest), before), shrunk = exp2(sub(before, m));
  store(most, m);
  store(shrink, shrunk);
  const Vec reference = sub(set1(0.0f), m);
  Vec sums[4];
  for (Vec& t : sums) t = set1(0.0f);
  for (int64_t i = 0; i < slots; i += 4) {
    Vec p[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      p[j] = fma(load(scores + (i + j) * kWidth), scale, reference);
      if constexpr (Math::kPack == 1) {
        p[j] = exp2(p[j]);
      } else {
        p[j] = exp2_for_halves(p[j]);
        if (low != nullptr) p[j] = select(hidden(low, high, i + j), set1(0.0f), p[j]);
      }
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
  store(sum, fma(load(sum), shrunk, add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
}

// A few rows, not more than a vector's lanes, the slots of each side by side, kAttentionBlock apart. `seen` holds the
// visible ones of each row; null: all are.
template <typename Math>
SPECDEC_INLINE void soften_rows(int64_t rows, float* scores, int64_t slots, float factor, const uint64_t* seen,
                                float* most, float* sum, float* shrink, typename Math::Element* weights) {
  float lanes[kWidth] = {};
  for (int64_t r = 0; r < rows; ++r) {
    Vec top = set1(-kInf);
    for (int64_t i = 0; i < slots; i += kWidth) {
      float* at = scores + r * kAttentionBlock + i;
      Vec x = load(at);
      if (seen != nullptr) {
        x = select(mask_of(static_cast<uint32_t>(seen[r] >> i)), x, set1(-kInf));
        store(at, x);
      }
      top = max(x, top);
    }
    lanes[r] = reduce_max(top);
  }
  const Vec highest = mul(load(lanes), set1(factor)), before = load(most);
  const Vec m = max(reference_of<Math>(highest), before), shrunk = exp2(sub(before, m));
  store(most, m, static_cast<int>(rows));
  store(shrink, shrunk);
  store(lanes, m);
  for (int64_t r = 0; r < rows; ++r) {
    const Vec reference = set1(-lanes[r]);
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < slots; i += kWidth) {
      Vec p = fma(load(scores + r * kAttentionBlock + i), set1(factor), reference);
      auto* to = weights + r * kAttentionBlock + i;
      if constexpr (Math::kPack == 1) {
        p = exp2(p);
        store(to, p);
      } else {
        p = exp2_for_halves(p);
        if (seen != nullptr) p = select(mask_of(static_cast<uint32_t>(seen[r] >> i)), p, set1(0.0f));
        store(to, p, kWidth);
      }
      total = add(total, p);
    }
    lanes[r] = reduce_add(total);
  }
  store(sum, add(mul(load(sum), shrunk), load(lanes)), static_cast<int>(rows));
}

}  // namespace specdec::SPECDEC_TIER
