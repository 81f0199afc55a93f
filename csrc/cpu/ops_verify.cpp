// The torch edge of verification: checks, outputs, and one walk per request over the rows of verify_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "specdec/walkers.h"
#include "verify_rows.h"

namespace specdec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("verify_chain: " + message);
}

// The public function words these checks for people; here they only keep a direct call of the op in bounds.
void check_fits(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool fits = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(i) == shape[i];
  check(fits, name + ": expected a CPU tensor whose shape fits the other arguments");
}

// The elements of a small tensor, contiguous and kept alive; null where there is no tensor.
template <class T>
struct Values {
  Values(const std::string& name, const MaybeTensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
    if (!tensor) return;
    check_fits(name, *tensor, shape);
    check(tensor->scalar_type() == type, name + ": unexpected dtype");
    kept = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
    data = static_cast<const T*>(kept->const_data_ptr());
  }

  MaybeTensor kept;
  const T* data = nullptr;
};

// Rows are read where they lie, whatever the stride between them; only columns that do not lie side by side are copied.
Tensor with_unit_columns(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

DType dtype_of(const std::string& name, const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        name + ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::kFloat : type == ScalarType::Half ? DType::kHalf : DType::kBf16;
}

// The rows of one tensor of logits, kept alive.
struct Logits {
  Logits(const std::string& name, const MaybeTensor& logits, int64_t nodes, int64_t columns, const MaybeTensor& allowed,
         int64_t vocabulary) {
    rows.columns = columns;
    rows.vocabulary = vocabulary;
    if (logits) {
      check_fits(name, *logits, {nodes, columns});
      rows.type = dtype_of(name, *logits);
      kept = with_unit_columns(*logits);
      rows.data = static_cast<const char*>(kept->const_data_ptr());
      rows.stride = kept->stride(0) * static_cast<int64_t>(kept->element_size());
    }
    if (allowed) {
      check_fits("allowed", *allowed, {nodes, (vocabulary + 31) / 32});
      check(allowed->scalar_type() == ScalarType::Int, "allowed: expected int32");
      kept_allowed = with_unit_columns(*allowed);
      rows.allowed = static_cast<const uint32_t*>(kept_allowed->const_data_ptr());
      rows.allowed_stride = kept_allowed->stride(0);
    }
  }

  LogitRows rows;
  MaybeTensor kept, kept_allowed;
};

// Temperature of each request, from [B, 4] parameters or from four numbers.
struct Temperatures {
  Temperatures(const MaybeTensor& params, const std::vector<double>& scalars, int64_t batch)
      : given("params", params, ScalarType::Float, {batch, 4}) {
    check(scalars.size() == 4, "scalars: expected 4 numbers, got " + std::to_string(scalars.size()));
    common = static_cast<float>(scalars[0]);
    bool plain = given.data || (scalars[1] == 0.0 && scalars[2] == 1.0 && scalars[3] == 0.0);
    for (int64_t b = 0; given.data && b < batch; ++b) {
      const float* row = given.data + 4 * b;
      plain = plain && row[1] == 0.0f && row[2] == 1.0f && row[3] == 0.0f;
    }
    check(plain, "top_k, top_p and min_p are not compiled for the CPU; call the overload .reference");
  }

  float operator[](int64_t request) const { return given.data ? given.data[4 * request] : common; }

  Values<float> given;
  float common;
};

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

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_chain(
    Tensor tokens, Tensor cu_nodes, Tensor target_logits, MaybeTensor draft_logits, MaybeTensor draft_vocab,
    int64_t max_depth, std::string method, MaybeTensor params, std::vector<double> scalars, MaybeTensor allowed,
    MaybeTensor draft_params, std::vector<double> draft_scalars, MaybeTensor draft_allowed, MaybeTensor seed,
    MaybeTensor offset, MaybeTensor accept_uniforms, MaybeTensor final_uniforms, bool logprobs) {
  const bool greedy = method == "greedy";
  check(greedy || method == "token",
        "method '" + method + "' is not compiled for the CPU; call the overload .reference");
  check(max_depth >= 0 && cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1, "expected max_depth >= 0 and cu_nodes [B+1]");
  check(target_logits.dim() == 2 && target_logits.size(1) >= 1, "target_logits: expected [N, V] with V >= 1");
  const int64_t nodes = target_logits.size(0), vocabulary = target_logits.size(1);
  const int64_t batch = cu_nodes.size(0) - 1, width = max_depth + 1;

  const Values<int32_t> ids("tokens", tokens, ScalarType::Int, {nodes});
  const Values<int32_t> starts("cu_nodes", cu_nodes, ScalarType::Int, {batch + 1});
  Logits target("target_logits", target_logits, nodes, vocabulary, allowed, vocabulary);
  const int64_t drafted = draft_vocab && draft_vocab->dim() == 1 ? draft_vocab->size(0) : vocabulary;
  const Values<int32_t> trimmed("draft_vocab", draft_vocab, ScalarType::Int, {drafted});
  Logits draft("draft_logits", draft_logits, nodes, drafted, draft_logits ? draft_allowed : MaybeTensor(), vocabulary);
  draft.rows.ids = trimmed.data;
  const Temperatures temperature(params, scalars, batch), draft_temperature(draft_params, draft_scalars, batch);
  const Values<int64_t> seeds("seed", seed, ScalarType::Long, {batch});
  const Values<int64_t> offsets("offset", offset, ScalarType::Long, {batch});
  const Values<float> coins("accept_uniforms", accept_uniforms, ScalarType::Float, {nodes});
  const Values<float> last_coins("final_uniforms", final_uniforms, ScalarType::Float, {batch});
  const bool random = seeds.kept && offsets.kept;
  check(greedy || random || (coins.kept && last_coins.kept), "expected seed and offset, or both uniforms");

  Tensor out_tokens = torch::stable::new_empty(tokens, {batch, width}, ScalarType::Int);
  Tensor out_nodes = torch::stable::new_empty(tokens, {batch, width}, ScalarType::Int);
  Tensor out_number = torch::stable::new_empty(tokens, {batch}, ScalarType::Int);
  Tensor out_logprobs = torch::stable::new_empty(tokens, {batch, logprobs ? width : 0}, ScalarType::Float);
  auto* token_data = static_cast<int32_t*>(out_tokens.mutable_data_ptr());
  auto* node_data = static_cast<int32_t*>(out_nodes.mutable_data_ptr());
  auto* number_data = static_cast<int32_t*>(out_number.mutable_data_ptr());
  auto* logprob_data = logprobs ? static_cast<float*>(out_logprobs.mutable_data_ptr()) : nullptr;

  for_requests(batch, target.rows, draft.rows, [&](CpuRows& rows, int64_t b) {
    // Bounds hold for any cu_nodes; whether they make sense is checked under SPECDEC_DEBUG.
    const int64_t first = std::clamp<int64_t>(starts.data[b], 0, nodes);
    const int64_t size = std::clamp<int64_t>(starts.data[b + 1] - first, 0, std::min(width, nodes - first));
    const Chain chain{ids.data + first, static_cast<int>(size), vocabulary};
    const Path path{token_data + b * width, node_data + b * width, logprob_data ? logprob_data + b * width : nullptr};
    int number = 0;
    if (size > 0 && greedy) {
      rows.start(first, 0.0f, 0.0f);
      number = walk_chain_greedy(rows, chain, path);
    } else if (size > 0) {
      rows.start(first, temperature[b], draft_temperature[b]);
      const Coins uniforms{coins.data ? coins.data + first : nullptr, last_coins.data ? last_coins.data + b : nullptr,
                           random ? static_cast<uint64_t>(seeds.data[b]) : 0,
                           random ? static_cast<uint64_t>(offsets.data[b]) : 0};
      number = walk_chain(rows, chain, uniforms, path);
    }
    number_data[b] = number;
    std::fill(path.tokens + number, path.tokens + width, -1);
    std::fill(path.nodes + number, path.nodes + width, -1);
    if (path.logprobs) std::fill(path.logprobs + number, path.logprobs + width, std::nanf(""));
  });
  return {out_tokens, out_nodes, out_number, out_logprobs};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) { m.impl("verify_chain", TORCH_BOX(&specdec::verify_chain)); }
