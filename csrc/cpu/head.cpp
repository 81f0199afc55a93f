#include "head.h"

#include "head_quant.h"
#include "head_scan.h"

namespace specdec::SPECDEC_TIER {
namespace {

template <typename T>
SPECDEC_INLINE FmaDot<T> fma_dot(const T*) {
  return {};
}

// Calls f with the dot product that the tier uses for a kind of weight.
template <typename F>
SPECDEC_INLINE void with_dot(const HeadArgs& args, F&& f) {
#if defined(SPECDEC_TIER_AVX512BF16)
  if (args.dtype == DType::kBf16) return f(Bf16Dot{});
#endif
  with_dtype(args.dtype, [&](auto tag) { f(fma_dot(tag)); });
}

int64_t packed_bytes(const HeadArgs& args) {
  if (args.kind != HeadWeight::kPlain) return packed_quantised_bytes(args);
  int64_t bytes = 0;
  with_dot(args, [&](auto dot) {
    using Dot = decltype(dot);
    bytes = args.batch * Dot::hidden_stride(args.dim) * static_cast<int64_t>(sizeof(typename Dot::Hidden));
  });
  return bytes;
}

void pack(const HeadArgs& args, const HeadRun& run) {
  if (args.kind != HeadWeight::kPlain) return pack_quantised(args, run);
  with_dot(args, [&](auto dot) {
    using Dot = decltype(dot);
    Dot::pack(args, run, static_cast<typename Dot::Hidden*>(args.packed) + run.first * Dot::hidden_stride(args.dim));
  });
}

void scan(const HeadArgs& args, int64_t task, int64_t first_item, int64_t last_item) {
  with_dot(args, [&](auto dot) { scan_items<decltype(dot)>(args, task, first_item, last_item); });
}

void finish(const HeadArgs& args, int64_t b) {
  const HeadSums sums = merge(args.sums + b * args.blocks, args.blocks);
  const bool broken = !(sums.sum >= 0.0);
  if (args.parts != nullptr) args.parts[b] = sums;
  if (args.lse != nullptr) {
    constexpr double kLn2 = 0x1.62e42fefa39efp-1;
    const double bits = __builtin_log2(sums.sum);
    // To a grid, because near 0 two sums of about 1 cancel, and their last bits tell how the rows were cut.
    const double entropy = __builtin_rint(kLn2 * (bits - sums.weighted / sums.sum) * 0x1p30) * 0x1p-30;
    args.lse[b] = static_cast<float>(sums.sum == 0.0 ? sums.anchor : kLn2 * (sums.anchor + bits));
    // Rounding must not take it below 0; a NaN stays.
    args.entropy[b] = static_cast<float>(sums.sum == 0.0 || entropy < 0.0 ? 0.0 : entropy);
  }

  HeadCandidate list[kHeadMostK];
  int32_t found = 0;
  Best best = {list, &found, args.k};
  for (int64_t task = 0; task < args.tasks && !broken; ++task) {
    const int64_t slot = task * args.batch + b;
    for (int i = 0; i < args.found[slot]; ++i) best.insert(args.candidates[slot * args.k + i]);
  }
  for (int i = 0; i < args.k; ++i) {
    args.logits[b * args.k + i] = i < found ? list[i].logit : -kInf;
    args.tokens[b * args.k + i] = i < found ? list[i].id : -1;
    if (args.keys != nullptr) args.keys[b * args.k + i] = i < found ? list[i].key : -__builtin_inf();
  }
}

}  // namespace

extern const HeadKernels head_kernels;
const HeadKernels head_kernels = {packed_bytes, pack, scan, finish};

}  // namespace specdec::SPECDEC_TIER
