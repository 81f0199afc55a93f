#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "traversal.h"

// The verification ops as the dispatcher calls them, in the order of their schema (specdec_kernels/verify.py): what the
// torch edges of all devices share. Not for device code.

namespace specdec {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using VerifyResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What both ops end with.
struct Rest {
  MaybeTensor params;
  std::vector<double> scalars;
  MaybeTensor allowed, draft_params;
  std::vector<double> draft_scalars;
  MaybeTensor draft_allowed, judge, reflect_logits;
  double reflect_weight;
  MaybeTensor synthetic;
  double lenience;
  MaybeTensor seed, offset, accept_uniforms, final_uniforms;
  bool logprobs;
};

// Both ops as one: chains have no parents.
using VerifyFunction = VerifyResults (*)(const Tensor& tokens, const MaybeTensor& parents, const Tensor& cu_nodes,
                                         const MaybeTensor& counts, const Tensor& target_logits,
                                         const MaybeTensor& draft_logits, const MaybeTensor& draft_vocab,
                                         int64_t max_nodes, int64_t max_depth, Method method, const std::string& name,
                                         const Rest& rest);

inline Method method_of(const std::string& name, bool chain) {
  static const std::pair<const char*, Method> kChains[] = {
      {"token", Method::kMultiRound},
      {"block", Method::kTraversal},
      {"greedy", Method::kGreedy},
      {"typical", Method::kTypical},
  };
  static const std::pair<const char*, Method> kTrees[] = {
      {"greedy", Method::kGreedy},
      {"target_only", Method::kTargetOnly},
      {"multi_round", Method::kMultiRound},
      {"without_replacement", Method::kWithoutReplacement},
      {"k_seq", Method::kKSeq},
      {"greedy_multi", Method::kGreedyMulti},
      {"typical", Method::kTypical},
      {"traversal", Method::kTraversal},
      {"traversal_iid", Method::kTraversalIid},
  };
  const auto* first = chain ? std::begin(kChains) : std::begin(kTrees);
  const auto* last = chain ? std::end(kChains) : std::end(kTrees);
  const auto* found = std::find_if(first, last, [&](const auto& entry) { return name == entry.first; });
  STD_TORCH_CHECK(found != last, "verify: no method '", name, "' for ", chain ? "chains" : "trees");
  return found->second;
}

// Walks count nodes and depths in 32 bits.
inline void check_sizes(int64_t max_nodes, int64_t max_depth) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(max_nodes >= 1 && max_nodes <= kMost, "verify: max_nodes: expected 1 .. 2^31 - 1");
  STD_TORCH_CHECK(max_depth >= 0 && max_depth < kMost, "verify: max_depth: expected 0 .. 2^31 - 2");
}

template <VerifyFunction kVerify>
VerifyResults verify_chain_op(Tensor tokens, Tensor cu_nodes, Tensor target_logits, MaybeTensor draft_logits,
                              MaybeTensor draft_vocab, int64_t max_depth, std::string method, MaybeTensor params,
                              std::vector<double> scalars, MaybeTensor allowed, MaybeTensor draft_params,
                              std::vector<double> draft_scalars, MaybeTensor draft_allowed, MaybeTensor judge,
                              MaybeTensor reflect_logits, double reflect_weight, MaybeTensor synthetic, double lenience,
                              MaybeTensor seed, MaybeTensor offset, MaybeTensor accept_uniforms,
                              MaybeTensor final_uniforms, bool logprobs) {
  check_sizes(1, max_depth);
  return kVerify(tokens, {}, cu_nodes, {}, target_logits, draft_logits, draft_vocab, max_depth + 1, max_depth,
                 method_of(method, true), method,
                 {params, scalars, allowed, draft_params, draft_scalars, draft_allowed, judge, reflect_logits,
                  reflect_weight, synthetic, lenience, seed, offset, accept_uniforms, final_uniforms, logprobs});
}

template <VerifyFunction kVerify>
VerifyResults verify_tree_op(Tensor tokens, Tensor parents, Tensor cu_nodes, MaybeTensor counts, Tensor target_logits,
                             MaybeTensor draft_logits, MaybeTensor draft_vocab, int64_t max_nodes, int64_t max_depth,
                             std::string method, MaybeTensor params, std::vector<double> scalars, MaybeTensor allowed,
                             MaybeTensor draft_params, std::vector<double> draft_scalars, MaybeTensor draft_allowed,
                             MaybeTensor judge, MaybeTensor reflect_logits, double reflect_weight,
                             MaybeTensor synthetic, double lenience, MaybeTensor seed, MaybeTensor offset,
                             MaybeTensor accept_uniforms, MaybeTensor final_uniforms, bool logprobs) {
  check_sizes(max_nodes, max_depth);
  return kVerify(tokens, parents, cu_nodes, counts, target_logits, draft_logits, draft_vocab, max_nodes, max_depth,
                 method_of(method, false), method,
                 {params, scalars, allowed, draft_params, draft_scalars, draft_allowed, judge, reflect_logits,
                  reflect_weight, synthetic, lenience, seed, offset, accept_uniforms, final_uniforms, logprobs});
}

}  // namespace specdec
