// Partial results become outputs. For tier files only.
#pragma once

#include "attention_scratch.h"
#include "attention_softmax.h"

namespace specdec::SPECDEC_TIER {

template <typename T>
void merge_row(const AttentionArgs& args, const AttentionMerge& merge, int64_t r, T* out) {
  const int64_t columns = args.values.columns, padded = round_up(columns, 16);
  const int64_t row = merge.at.first_row + r, head = merge.at.kv_head * args.group + row % args.group;
  const int64_t at = merge.at.nodes[row / args.group].node * args.query_heads + head;
  float most = kNothingSeen;
  const auto for_parts = [&](auto&& f) {
    for (int i = 0; i < 2; ++i)
      for (int64_t split = 0; split < merge.splits[i]; ++split)
        f(merge.parts[i] + split * merge.strides[i] + r * args.partial_stride);
  };
  for_parts([&](float* part) { most = part[padded] > most ? part[padded] : most; });
  const bool nothing = most == kNothingSeen;
  const bool sinks = args.sinks != nullptr;
  const double sink = sinks ? args.sinks[head] * kLog2E : 0.0;
  const bool leads = sinks && sink > most;
  if (leads) most = static_cast<float>(-__builtin_floor(-sink));
  // Where floats are further apart than whole numbers, the sink is as good as what it was rounded to.
  double total = leads && sink >= 0x1p23 ? 1.0 : sinks ? __builtin_exp2(sink - most) : 0.0;
  for_parts([&](float* part) {
    float factor[kWidth];
    store(factor, exp2(set1(part[padded] - most)));
    part[padded + 2] = factor[0];
    // Of scores that are all -inf, weights that become bf16 leave a trace.
    const double sum = static_cast<double>(part[padded + 1]) * factor[0];
    if (!nothing || sum != sum) total += sum;
  });
  if (args.lse != nullptr)
    args.lse[at] =
        static_cast<float>(total == 0.0 ? -__builtin_inf() : (most + __builtin_log2(total)) * 0x1.62e42fefa39efp-1);
  float scale = static_cast<float>(1.0 / total);
  if (args.values.scale != nullptr) scale *= args.values.scale[merge.at.kv_head];
  if (nothing && total == total) scale = 0.0f;
  constexpr int kVectors = 8;
  for (int64_t d = 0; d < columns; d += kVectors * kWidth) {
    Vec values[kVectors];
    for (Vec& value : values) value = set1(0.0f);
    const int vectors = static_cast<int>(padded - d < kVectors * kWidth ? (padded - d) / kWidth : kVectors);
    for_parts([&](float* part) __attribute__((always_inline)) {
      const Vec factor = set1(part[padded + 2]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        if (v < vectors) values[v] = fma(load(part + d + v * kWidth), factor, values[v]);
    });
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = columns - d - v * kWidth;
      if (left > 0)
        store(out + at * columns + d + v * kWidth, mul(values[v], set1(scale)),
              static_cast<int>(left < kWidth ? left : kWidth));
    }
  }
}

inline void merge(const AttentionArgs& args, const AttentionMerge& merge) {
  const auto rows = [&](auto* out) {
    for (int64_t r = 0; r < merge.at.rows; ++r) merge_row(args, merge, r, out);
  };
  switch (args.query_type) {
    case DType::kFloat:
      return rows(static_cast<float*>(args.out));
    case DType::kBf16:
      return rows(static_cast<Bf16*>(args.out));
    case DType::kHalf:
      return rows(static_cast<Half*>(args.out));
  }
}

}  // namespace specdec::SPECDEC_TIER
