// The torch edge of the head: checks, outputs and scratch, then the tier's kernels over blocks of rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "head.h"
#include "op_args.h"
#include "tiers.h"

namespace specdec {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Part = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Multiply-adds that are worth waking a thread for.
constexpr int64_t kWorkPerTask = 1 << 18;

template <class... Message>
void check(bool ok, const Message&... message) {
  STD_TORCH_CHECK(ok, "head: ", message...);
}

HeadWeight kind_of(const Tensor& weight, const Tensor& hidden) {
  switch (weight.scalar_type()) {
    case ScalarType::Char:
      return HeadWeight::kInt8;
    case ScalarType::Float8_e4m3fn:
      return HeadWeight::kFp8;
    case ScalarType::Byte:
      return HeadWeight::kInt4;
    default:
      check(weight.scalar_type() == hidden.scalar_type(),
            "weight: expected hidden's dtype, int8, float8_e4m3fn, or uint8 for int4");
      return HeadWeight::kPlain;
  }
}

// Groups of columns of an int4 weight.
int64_t groups_of(const Tensor& hidden) { return (hidden.size(1) + kHeadColumns - 1) / kHeadColumns; }

// [V], of an int4 weight [V, G].
std::vector<int64_t> scale_shape(const Tensor& weight, const Tensor& hidden) {
  if (kind_of(weight, hidden) != HeadWeight::kInt4) return {weight.size(0)};
  return {weight.size(0), groups_of(hidden)};
}

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

// The streams of a draw; without a seed nothing is drawn.
struct Streams {
  Streams(int64_t batch, const MaybeTensor& seed, const MaybeTensor& offset, const MaybeTensor& row)
      : seeds("seed", seed, ScalarType::Long, {batch}),
        offsets("offset", offset, ScalarType::Long, {batch}),
        rows("row", row, ScalarType::Int, {batch}) {
    check(seed.has_value() == offset.has_value(), "offset: expected with a seed, and only with one");
  }

  const Values<int64_t> seeds, offsets;
  const Values<int32_t> rows;
};

// One call: its arguments, checked, and whatever they point to.
class Head {
 public:
  Head(const Tensor& hidden, const Tensor& weight, int64_t k, const Streams& streams, const MaybeTensor& rows,
       const MaybeTensor& row_groups, const MaybeTensor& token_ids, const MaybeTensor& bias, const MaybeTensor& scale,
       double temperature, const MaybeTensor& temperatures)
      : hidden_(hidden),
        groups_("row_groups", row_groups, ScalarType::Int, {hidden.size(0)}),
        ids_("token_ids", token_ids, ScalarType::Int, {weight.size(0)}),
        biases_("bias", bias, bias ? bias->scalar_type() : ScalarType::Float, {weight.size(0)}),
        scales_("scale", scale, ScalarType::Float, scale_shape(weight, hidden)),
        temperatures_("temperatures", temperatures, ScalarType::Float, {hidden.size(0)}) {
    check(k >= 1 && k <= kHeadMostK, "k: expected 1..", kHeadMostK, ", got ", k);
    args.k = static_cast<int>(k);
    args.dtype = dtype_of("hidden", hidden);
    args.batch = hidden.size(0);
    args.dim = hidden.size(1);
    args.hidden = hidden.const_data_ptr();
    args.hidden_strides[0] = hidden.stride(0);
    args.hidden_strides[1] = hidden.stride(1);
    take_weight(weight);
    take_rows(rows, token_ids);
    args.token_ids = ids_.data;
    args.bias = biases_.data;
    if (bias) args.bias_dtype = dtype_of("bias", *bias);
    (args.kind == HeadWeight::kInt4 ? args.group_scale : args.scale) = scales_.data;
    args.temperature = static_cast<float>(temperature);
    args.temperatures = temperatures_.data;
    args.seed = streams.seeds.data;
    args.offset = streams.offsets.data;
    args.row = streams.rows.data;
  }

  Tensor make(const std::vector<int64_t>& shape, ScalarType type) const {
    return torch::stable::new_empty(hidden_, shape, type);
  }

  void run() {
    args.blocks = args.batch == 0 ? 0 : (args.count + kHeadBlock - 1) / kHeadBlock;
    const int64_t items = args.blocks * args.run_count;
    const int64_t work = args.count * std::max<int64_t>(args.dim, 1) * args.batch / kWorkPerTask + 1;
    args.tasks = std::max<int64_t>(1, std::min({items, work, int64_t{torch::stable::get_num_threads()}}));

    const HeadKernels& head = *kernels().head;
    Scratch scratch;
    const int64_t lists = args.tasks * args.batch;
    scratch.add(&args.packed, head.packed_bytes(args));
    scratch.add(&args.sums, args.batch * args.blocks * static_cast<int64_t>(sizeof(HeadSums)));
    scratch.add(&args.candidates, lists * args.k * static_cast<int64_t>(sizeof(HeadCandidate)));
    scratch.add(&args.found, lists * static_cast<int64_t>(sizeof(int32_t)));
    scratch.add(&args.buffer, args.tasks * kHeadRun * kHeadBlock * static_cast<int64_t>(sizeof(float)));
    scratch.allocate(hidden_);

    for (const HeadRun& run : runs_) head.pack(args, run);
    std::fill_n(args.found, lists, 0);
    // Threads take the next few items when they are done with the last ones: cores differ, and some are disturbed.
    const int64_t portion = std::clamp<int64_t>(items / (16 * args.tasks), 1, 8);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, args.tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        for (int64_t item; (item = next.fetch_add(portion)) < items;)
          head.scan(args, task, item, std::min(item + portion, items));
      }
    });
    each_request(args.blocks, [&](int64_t b) { head.finish(args, b); });
  }

  Head(const Head&) = delete;

  HeadArgs args{};

 private:
  void take_weight(const Tensor& weight) {
    args.kind = kind_of(weight, hidden_);
    check(weight.size(1) == (args.kind == HeadWeight::kInt4 ? groups_of(hidden_) * kHeadColumns / 2 : args.dim),
          "weight: expected [V, D], or 64 bytes for every 128 columns of int4");
    check(args.kind == HeadWeight::kPlain || scales_.kept,
          "scale: expected the scales of a quantised weight, got none");
    args.height = weight.size(0);
    weight_ = args.dim <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    args.weight = weight_->const_data_ptr();
    args.weight_stride = weight_->stride(0);
  }

  void take_rows(const MaybeTensor& rows, const MaybeTensor& token_ids) {
    args.count = args.height;
    int64_t lines = 1;
    args.shared_rows = true;
    check(rows || !groups_.kept, "row_groups: expected rows beside it");
    if (rows) {
      args.shared_rows = rows->dim() == 1;
      check(rows->is_cpu() && rows->scalar_type() == ScalarType::Int && !token_ids &&
                (args.shared_rows ? !groups_.kept : rows->dim() == 2) &&
                (args.shared_rows || groups_.kept || rows->size(0) == args.batch),
            "rows: expected int32 [R], [B, R], or [G, R] with row_groups, and no token_ids beside it");
      rows_ = torch::stable::contiguous(*rows);
      args.rows = static_cast<const int32_t*>(rows_->const_data_ptr());
      args.count = rows->size(rows->dim() - 1);
      if (!args.shared_rows) lines = rows->size(0);
    }
    const auto line_of = [&](int64_t b) -> int64_t {
      if (args.shared_rows) return 0;
      const int64_t line = groups_.kept ? groups_.data[b] : b;
      return line < lines ? line : -1;
    };
    for (int64_t b = 0; b < args.batch; ++b) {
      const int64_t line = line_of(b);
      if (b == 0 || line != runs_.back().line || runs_.back().size == kHeadRun) runs_.push_back({b, 0, line});
      ++runs_.back().size;
    }
    args.runs = runs_.data();
    args.run_count = static_cast<int64_t>(runs_.size());
  }

  template <class F>
  void each_request(int64_t cost, F f) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(cost, 1));
    torch::stable::parallel_for(0, args.batch, grain, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) f(b);
    });
  }

  const Tensor& hidden_;
  const Values<int32_t> groups_, ids_;
  const Values<void> biases_;
  const Values<float> scales_, temperatures_;
  MaybeTensor weight_, rows_;
  std::vector<HeadRun> runs_;
};

// Before anything asks for a size that may not be there.
void check_shapes(const Tensor& hidden, const Tensor& weight) {
  check(hidden.is_cpu() && hidden.dim() == 2, "hidden: expected a CPU tensor [B, D]");
  check(weight.is_cpu() && weight.dim() == 2, "weight: expected [V, D]");
}

Results whole(Head head, bool return_logits) {
  HeadArgs& args = head.args;
  Tensor logits = head.make({args.batch, args.k}, ScalarType::Float);
  Tensor tokens = head.make({args.batch, args.k}, ScalarType::Int);
  Tensor lse = head.make({args.batch}, ScalarType::Float), entropy = head.make({args.batch}, ScalarType::Float);
  Tensor all_logits = head.make({args.batch, return_logits ? args.count : 0}, ScalarType::Float);
  args.logits = static_cast<float*>(logits.mutable_data_ptr());
  args.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  if (return_logits) args.all_logits = static_cast<float*>(all_logits.mutable_data_ptr());
  head.run();
  return {logits, tokens, lse, entropy, all_logits};
}

Results head_topk(const Tensor& hidden, const Tensor& weight, int64_t k, const MaybeTensor& rows,
                  const MaybeTensor& row_groups, const MaybeTensor& token_ids, const MaybeTensor& bias,
                  const MaybeTensor& scale, double temperature, const MaybeTensor& temperatures, bool return_logits) {
  check_shapes(hidden, weight);
  const Streams none(hidden.size(0), {}, {}, {});
  return whole({hidden, weight, k, none, rows, row_groups, token_ids, bias, scale, temperature, temperatures},
               return_logits);
}

Results head_sample(const Tensor& hidden, const Tensor& weight, int64_t k, const Tensor& seed, const Tensor& offset,
                    const MaybeTensor& row, const MaybeTensor& rows, const MaybeTensor& row_groups,
                    const MaybeTensor& token_ids, const MaybeTensor& bias, const MaybeTensor& scale, double temperature,
                    const MaybeTensor& temperatures, bool return_logits) {
  check_shapes(hidden, weight);
  const Streams streams(hidden.size(0), seed, offset, row);
  return whole({hidden, weight, k, streams, rows, row_groups, token_ids, bias, scale, temperature, temperatures},
               return_logits);
}

Part head_part(const Tensor& hidden, const Tensor& weight, int64_t k, const MaybeTensor& seed,
               const MaybeTensor& offset, const MaybeTensor& row, const MaybeTensor& rows,
               const MaybeTensor& row_groups, const MaybeTensor& token_ids, const MaybeTensor& bias,
               const MaybeTensor& scale, double temperature, const MaybeTensor& temperatures) {
  check_shapes(hidden, weight);
  const Streams streams(hidden.size(0), seed, offset, row);
  Head head(hidden, weight, k, streams, rows, row_groups, token_ids, bias, scale, temperature, temperatures);
  HeadArgs& args = head.args;
  Tensor keys = head.make({args.batch, k}, ScalarType::Double), logits = head.make({args.batch, k}, ScalarType::Float);
  Tensor tokens = head.make({args.batch, k}, ScalarType::Int), sums = head.make({args.batch, 3}, ScalarType::Double);
  args.keys = static_cast<double*>(keys.mutable_data_ptr());
  args.logits = static_cast<float*>(logits.mutable_data_ptr());
  args.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  static_assert(sizeof(HeadSums) == 3 * sizeof(double));
  args.parts = static_cast<HeadSums*>(sums.mutable_data_ptr());
  head.run();
  return {keys, logits, tokens, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) {
  m.impl("head_part", TORCH_BOX(&head_part));
  m.impl("head_sample", TORCH_BOX(&head_sample));
  m.impl("head_topk", TORCH_BOX(&head_topk));
}

}  // namespace specdec
