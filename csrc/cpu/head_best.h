// The k best candidates of a request. For tier files only.
#pragma once

#include "head.h"
#include "simd_math.h"

namespace specdec::SPECDEC_TIER {

SPECDEC_INLINE bool before(const HeadCandidate& a, const HeadCandidate& b) {
  return a.key > b.key || (a.key == b.key && a.id < b.id);
}

struct Best {
  HeadCandidate* list;
  int32_t* found;
  int k;

  // What an fp32 key must reach to matter: below the k-th key by more than its own rounding.
  float threshold() const {
    if (*found < k) return -kInf;
    const double key = list[k - 1].key;
    return static_cast<float>(key - __builtin_fabs(key) * 0x1p-20 - 0x1p-20);
  }

  void insert(const HeadCandidate& candidate) {
    if (*found == k && !before(candidate, list[k - 1])) return;
    int i = *found < k ? (*found)++ : k - 1;
    for (; i > 0 && before(candidate, list[i - 1]); --i) list[i] = list[i - 1];
    list[i] = candidate;
  }
};

SPECDEC_INLINE StreamKey stream_of(const HeadArgs& args, int64_t b) {
  constexpr uint32_t kDraft = 2;
  const uint64_t seed = static_cast<uint64_t>(args.seed[b]);
  const uint32_t row = args.row == nullptr ? 0 : static_cast<uint32_t>(args.row[b]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(args.offset[b]), kDraft,
          row};
}

// Offers what could be among the k best of `size` logits of request b; `most` is the largest of them, `ids` are their
// names. Temperature 0 draws nothing.
SPECDEC_INLINE void offer(const HeadArgs& args, int64_t b, const float* logits, const int32_t* ids, int size,
                          float most, float temperature, Best best) {
  const bool draws = args.seed != nullptr && temperature > 0.0f;
  const float reach = draws ? most / temperature + kMostNoise : most;
  if (most == -kInf || reach < best.threshold()) return;
  const StreamKey stream = draws ? stream_of(args, b) : StreamKey{};
  for (int i = 0; i < size; i += kWidth) {
    const Vec l = load(logits + i);
    Vec noise = set1(0.0f);
    Mask hopeful = both(gt(l, set1(-kInf)), ge(l, set1(best.threshold())));
    if (draws) {
      const Vec scaled = div(l, set1(temperature));
      // Noise is bounded, so most logits need none.
      hopeful = both(gt(l, set1(-kInf)), ge(add(scaled, set1(kMostNoise)), set1(best.threshold())));
      if (!any(hopeful)) continue;
      noise = gumbels(stream, iload(ids + i));
      hopeful = both(hopeful, ge(add(scaled, noise), set1(best.threshold())));
    }
    uint32_t lanes = bits(hopeful);
    if (lanes == 0) continue;
    float added[kWidth];
    store(added, noise);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const double logit = logits[i + lane];
      best.insert({draws ? logit / temperature + added[lane] : logit, logits[i + lane], ids[i + lane]});
    }
  }
}

}  // namespace specdec::SPECDEC_TIER
