// The torch edge of verification: checks, outputs, and one walk per request over the rows of cpu_rows.h.
#include <atomic>

#include "cpu_rows.h"
#include "verify_args.h"

namespace specdec {
namespace {

// Runs work(rows, request) for every request: the threads take one request each, the next when they are done, or all
// share the rows of one where there are fewer requests than threads.
template <class F>
void for_requests(int64_t batch, const LogitRows& target, const LogitRows& draft, const F& work) {
  const int64_t threads = torch::stable::get_num_threads();
  if (batch < threads) {
    CpuRows rows(target, draft, Team{true});
    for (int64_t b = 0; b < batch; ++b) work(rows, b);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    CpuRows rows(target, draft, Team{false});
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < batch;) work(rows, b);
  });
}

VerifyResults verify(const Tensor& tokens, const MaybeTensor& parents, const Tensor& cu_nodes,
                     const MaybeTensor& counts, const Tensor& target_logits, const MaybeTensor& draft_logits,
                     const MaybeTensor& draft_vocab, int64_t max_nodes, int64_t max_depth, Method method,
                     const std::string& name, const Rest& rest) {
  check(cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1, "cu_nodes: expected [B+1]");
  check(target_logits.dim() == 2 && target_logits.size(1) >= 1, "target_logits: expected [N, V] with V >= 1");
  const int64_t nodes = target_logits.size(0), vocabulary = target_logits.size(1), batch = cu_nodes.size(0) - 1;

  const Values<int32_t> ids("tokens", tokens, ScalarType::Int, {nodes});
  const Values<int32_t> ups("parents", parents, ScalarType::Int, {nodes});
  const Values<int32_t> starts("cu_nodes", cu_nodes, ScalarType::Int, {batch + 1});
  const Values<int32_t> merged("counts", counts, ScalarType::Int, {nodes});
  Logits target("target_logits", target_logits, nodes, vocabulary, rest.allowed, vocabulary);
  target.mix(rest.reflect_logits, nodes, rest.reflect_weight);
  const int64_t drafted = draft_vocab && draft_vocab->dim() == 1 ? draft_vocab->size(0) : vocabulary;
  check(drafted >= 1, "draft_vocab: expected [R] with R >= 1");
  const Values<int32_t> trimmed("draft_vocab", draft_vocab, ScalarType::Int, {drafted});
  Logits draft("draft_logits", draft_logits, nodes, drafted, draft_logits ? rest.draft_allowed : MaybeTensor(),
               vocabulary);
  draft.rows.ids = trimmed.data;
  const Sampling sampling(rest.params, rest.scalars, batch),
      draft_sampling(rest.draft_params, rest.draft_scalars, batch);
  const Values<bool> judge("judge", rest.judge, ScalarType::Bool, {nodes});
  const Values<float> synthetic("synthetic", rest.synthetic, ScalarType::Float, {max_depth});
  // There are no rates where no draft can be: still a pointer that is not null.
  static const float kNoRates = 0.0f;
  const float* rates = synthetic.data || !synthetic.kept ? synthetic.data : &kNoRates;
  const Values<int64_t> seeds("seed", rest.seed, ScalarType::Long, {batch});
  const Values<int64_t> offsets("offset", rest.offset, ScalarType::Long, {batch});
  const Values<float> coins("accept_uniforms", rest.accept_uniforms, ScalarType::Float, {nodes});
  const Values<float> last_coins("final_uniforms", rest.final_uniforms, ScalarType::Float, {batch});
  const bool random = seeds.kept && offsets.kept, greedy = method == Method::kGreedy;
  check((greedy && !rates) || random || (last_coins.kept && (coins.kept || (method == Method::kTypical && !rates))),
        "expected seed and offset, or both uniforms");
  check(!merged.data || random, "counts: expected seed and offset beside them");
  const bool needs_q = method == Method::kKSeq || method == Method::kGreedyMulti;
  check(!needs_q || draft_logits || rates, "draft_logits: method '" + name + "' needs them");

  const Outputs out(tokens, batch, max_depth + 1, rest.logprobs);
  for_requests(batch, target.rows, draft.rows, [&](CpuRows& rows, int64_t b) {
    // Bounds hold for any cu_nodes; whether they make sense is checked under SPECDEC_DEBUG.
    const int64_t first = std::clamp<int64_t>(starts.data[b], 0, nodes);
    const int64_t size = std::clamp<int64_t>(starts.data[b + 1] - first, 0, std::min(max_nodes, nodes - first));
    if (size == 0) return out.finish(b, 0);
    Tree tree = {ids.data + first,
                 ups.from(first),
                 nullptr,
                 nullptr,
                 merged.from(first),
                 static_cast<int>(size),
                 static_cast<int>(max_depth),
                 vocabulary};
    if (tree.parents) rows.link(&tree);
    const Coins uniforms = {coins.from(first), last_coins.from(b), random ? static_cast<uint64_t>(seeds.data[b]) : 0,
                            random ? static_cast<uint64_t>(offsets.data[b]) : 0};
    const Lossy lossy = {judge.from(first), rates, static_cast<float>(rest.lenience)};
    rows.start(first, tree.nodes, greedy ? Filters{0.0f, 0.0f, 1.0f, 0.0f} : sampling[b], draft_sampling[b],
               out.token_data + b * out.width, out.node_data + b * out.width, out.logprobs_of(b));
    out.finish(b, walk(method, Request<CpuRows>{rows, tree, uniforms, lossy}));
  });
  return {out.tokens, out.nodes, out.number, out.logprobs};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) {
  m.impl("verify_chain", TORCH_BOX(&specdec::verify_chain_op<&specdec::verify>));
  m.impl("verify_tree", TORCH_BOX(&specdec::verify_tree_op<&specdec::verify>));
}
