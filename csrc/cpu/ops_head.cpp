// The torch edge of the head: checks, outputs and scratch, then the tier's kernels over blocks of rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "head.h"
#include "tiers.h"

namespace specdec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Multiply-adds that are worth waking a thread for.
constexpr int64_t kWorkPerTask = 1 << 18;

template <class... Message>
void check(bool ok, const Message&... message) {
  STD_TORCH_CHECK(ok, "head: ", message...);
}

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, "head: ", name, ": expected float32, bfloat16 or float16");
  }
}

// A vector of `size` numbers, contiguous and kept alive; null where there is none.
template <class T>
struct Values {
  Values(const char* name, const MaybeTensor& tensor, ScalarType type, int64_t size) {
    if (!tensor) return;
    check(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == size && tensor->scalar_type() == type, name,
          ": expected a CPU tensor whose shape and dtype fit the other arguments");
    kept = torch::stable::contiguous(*tensor);
    data = static_cast<const T*>(kept->const_data_ptr());
  }

  MaybeTensor kept;
  const T* data = nullptr;
};

// Pieces of one allocation, each on a cache line of its own.
class Scratch {
 public:
  template <class T>
  void add(T** pointer, int64_t bytes) {
    pieces_.push_back({reinterpret_cast<void**>(pointer), size_});
    size_ += (bytes + 63) / 64 * 64;
  }
  void allocate(const Tensor& like) {
    kept_ = torch::stable::new_empty(like, {size_ + 64}, ScalarType::Byte);
    auto* base = static_cast<char*>(kept_->mutable_data_ptr());
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    for (const auto& [pointer, start] : pieces_) *pointer = base + start;
  }

 private:
  std::vector<std::pair<void**, int64_t>> pieces_;
  int64_t size_ = 0;
  MaybeTensor kept_;
};

Results run(const Tensor& hidden, const Tensor& weight, int64_t k, HeadArgs args, const MaybeTensor& rows,
            const MaybeTensor& token_ids, const MaybeTensor& bias, const MaybeTensor& scale, double temperature,
            const MaybeTensor& temperatures, bool return_logits) {
  check(hidden.is_cpu() && hidden.dim() == 2, "hidden: expected a CPU tensor [B, D]");
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight: expected [V, D]");
  check(weight.scalar_type() == hidden.scalar_type(), "weight: expected hidden's dtype");
  check(k >= 1 && k <= kHeadMostK, "k: expected 1..", kHeadMostK, ", got ", k);
  args.dtype = dtype_of("hidden", hidden);
  args.k = static_cast<int>(k);
  args.batch = hidden.size(0);
  args.dim = hidden.size(1);
  args.hidden = hidden.const_data_ptr();
  args.hidden_strides[0] = hidden.stride(0);
  args.hidden_strides[1] = hidden.stride(1);
  args.height = weight.size(0);
  const Tensor unit_columns = args.dim <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  args.weight = unit_columns.const_data_ptr();
  args.weight_stride = unit_columns.stride(0);

  args.count = args.height;
  MaybeTensor kept_rows;
  if (rows) {
    const bool shared = rows->dim() == 1;
    check(rows->is_cpu() && rows->scalar_type() == ScalarType::Int && !token_ids &&
              (shared || (rows->dim() == 2 && rows->size(0) == args.batch)),
          "rows: expected int32 [R] or [B, R], and no token_ids beside it");
    kept_rows = torch::stable::contiguous(*rows);
    args.rows = static_cast<const int32_t*>(kept_rows->const_data_ptr());
    args.count = rows->size(rows->dim() - 1);
    args.rows_stride = shared ? 0 : args.count;
  }
  const Values<int32_t> ids("token_ids", token_ids, ScalarType::Int, args.height);
  const Values<void> biases("bias", bias, bias ? bias->scalar_type() : ScalarType::Float, args.height);
  const Values<float> scales("scale", scale, ScalarType::Float, args.height);
  const Values<float> per_request("temperatures", temperatures, ScalarType::Float, args.batch);
  args.token_ids = ids.data;
  args.bias = biases.data;
  if (bias) args.bias_dtype = dtype_of("bias", *bias);
  args.scale = scales.data;
  args.temperature = static_cast<float>(temperature);
  args.temperatures = per_request.data;

  auto make = [&](const std::vector<int64_t>& shape, ScalarType type) {
    return torch::stable::new_empty(hidden, shape, type);
  };
  Tensor logits = make({args.batch, k}, ScalarType::Float), tokens = make({args.batch, k}, ScalarType::Int);
  Tensor lse = make({args.batch}, ScalarType::Float), entropy = make({args.batch}, ScalarType::Float);
  Tensor all_logits = make({args.batch, return_logits ? args.count : 0}, ScalarType::Float);
  args.logits = static_cast<float*>(logits.mutable_data_ptr());
  args.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  if (return_logits) args.all_logits = static_cast<float*>(all_logits.mutable_data_ptr());

  args.blocks = args.batch == 0 ? 0 : (args.count + kHeadBlock - 1) / kHeadBlock;
  const int64_t work = args.count * std::max<int64_t>(args.dim, 1) * args.batch / kWorkPerTask + 1;
  args.tasks = std::max<int64_t>(1, std::min({args.blocks, work, int64_t{torch::stable::get_num_threads()}}));

  const HeadKernels& head = *kernels().head;
  Scratch scratch;
  const int64_t lists = args.tasks * args.batch;
  scratch.add(&args.packed, head.packed_bytes(args));
  scratch.add(&args.sums, args.batch * args.blocks * static_cast<int64_t>(sizeof(HeadSums)));
  scratch.add(&args.candidates, lists * k * static_cast<int64_t>(sizeof(HeadCandidate)));
  scratch.add(&args.found, lists * static_cast<int64_t>(sizeof(int32_t)));
  scratch.add(&args.buffer, args.tasks * kHeadGroup * kHeadBlock * static_cast<int64_t>(sizeof(float)));
  scratch.allocate(hidden);

  head.pack(args);
  std::fill_n(args.found, lists, 0);
  // Threads take the next few blocks when they are done with the last ones: cores differ, and some are disturbed.
  const int64_t portion = std::clamp<int64_t>(args.blocks / (8 * args.tasks), 1, 8);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, args.tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      for (int64_t block; (block = next.fetch_add(portion)) < args.blocks;)
        head.scan(args, task, block, std::min(block + portion, args.blocks));
    }
  });
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(args.blocks, 1));
  torch::stable::parallel_for(0, args.batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) head.finish(args, b);
  });
  return {logits, tokens, lse, entropy, all_logits};
}

Results head_topk(const Tensor& hidden, const Tensor& weight, int64_t k, const MaybeTensor& rows,
                  const MaybeTensor& row_groups, const MaybeTensor& token_ids, const MaybeTensor& bias, const MaybeTensor& scale, double temperature,
                  const MaybeTensor& temperatures, bool return_logits) {
  check(!row_groups, "row_groups: not served yet");
  return run(hidden, weight, k, HeadArgs{}, rows, token_ids, bias, scale, temperature, temperatures, return_logits);
}

Results head_sample(const Tensor& hidden, const Tensor& weight, int64_t k, const Tensor& seed, const Tensor& offset,
                    const MaybeTensor& row, const MaybeTensor& rows, const MaybeTensor& row_groups,
                    const MaybeTensor& token_ids, const MaybeTensor& bias, const MaybeTensor& scale, double temperature,
                    const MaybeTensor& temperatures, bool return_logits) {
  check(hidden.dim() == 2, "hidden: expected [B, D]");
  check(!row_groups, "row_groups: not served yet");
  const Values<int64_t> seeds("seed", seed, ScalarType::Long, hidden.size(0));
  const Values<int64_t> offsets("offset", offset, ScalarType::Long, hidden.size(0));
  const Values<int32_t> numbers("row", row, ScalarType::Int, hidden.size(0));
  HeadArgs args{};
  args.seed = seeds.data;
  args.offset = offsets.data;
  args.row = numbers.data;
  return run(hidden, weight, k, args, rows, token_ids, bias, scale, temperature, temperatures, return_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) {
  m.impl("head_topk", TORCH_BOX(&head_topk));
  m.impl("head_sample", TORCH_BOX(&head_sample));
}

}  // namespace specdec
