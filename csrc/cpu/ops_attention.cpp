// The torch edge of tree attention: checks, raw pointers, and what each request reads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "op_args.h"

namespace specdec {
namespace {

constexpr int64_t kJobElements = int64_t{1} << 15;    // of a job's rows: their sums stay in the second level cache
constexpr int64_t kWorkPerThread = int64_t{1} << 20;  // multiply-adds that are worth waking one for

template <class... Message>
void check(bool ok, const Message&... message) {
  STD_TORCH_CHECK(ok, "tree_attention: ", message...);
}

// A few floats of any dtype, in fp32.
struct Floats {
  Floats(const char* name, const MaybeTensor& tensor, int64_t size) {
    if (!tensor) return;
    check(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == size, name, ": expected a CPU tensor of ", size,
          " numbers");
    const Tensor whole = torch::stable::contiguous(*tensor);
    switch (tensor->scalar_type()) {
      case ScalarType::Float:
        take(static_cast<const float*>(whole.const_data_ptr()), size);
        break;
      case ScalarType::Double:
        take(static_cast<const double*>(whole.const_data_ptr()), size);
        break;
      case ScalarType::BFloat16:
        take(static_cast<const c10::BFloat16*>(whole.const_data_ptr()), size);
        break;
      case ScalarType::Half:
        take(static_cast<const c10::Half*>(whole.const_data_ptr()), size);
        break;
      default:
        check(false, name, ": expected a float dtype");
    }
  }

  template <class T>
  void take(const T* from, int64_t size) {
    kept.reserve(size + 1);  // a pointer that is not null where there are no heads
    for (int64_t i = 0; i < size; ++i) kept.push_back(static_cast<float>(from[i]));
    data = kept.data();
  }

  std::vector<float> kept;
  const float* data = nullptr;
};

CacheType cache_type(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Float:
      return CacheType::kFloat;
    case ScalarType::BFloat16:
      return CacheType::kBf16;
    case ScalarType::Half:
      return CacheType::kHalf;
    case ScalarType::Float8_e4m3fn:
      return CacheType::kE4m3;
    case ScalarType::Float8_e5m2:
      return CacheType::kE5m2;
    case ScalarType::Char:
      return CacheType::kInt8;
    default:
      STD_TORCH_CHECK(false, "tree_attention: key_cache: expected a float dtype, float8 (e4m3fn, e5m2) or int8");
  }
}

AttentionCache cache_of(const Tensor& cache, bool paged, const float* scale) {
  const int head = paged ? 2 : 1, slot = paged ? 1 : 2;
  return {cache.const_data_ptr(),
          cache.stride(0),
          cache.stride(head),
          cache.stride(slot),
          cache.stride(3),
          cache.size(3),
          scale};
}

std::tuple<Tensor, Tensor> tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                          const Tensor& depths, const Tensor& bits, const Tensor& cu_nodes,
                                          int64_t max_nodes, const Tensor& prefix_lens, const MaybeTensor& block_table,
                                          const MaybeTensor& shared_groups, const MaybeTensor& shared_lens,
                                          double scale, int64_t window, double softcap, const MaybeTensor& sinks,
                                          const MaybeTensor& k_scale, const MaybeTensor& v_scale, bool return_lse) {
  // The public function words these checks for people; here they only keep a direct call in bounds.
  check(query.is_cpu() && query.dim() == 3, "query: expected a CPU tensor [N, Hq, D]");
  check(key_cache.is_cpu() && key_cache.dim() == 4 && value_cache.is_cpu() && value_cache.dim() == 4 &&
            key_cache.scalar_type() == value_cache.scalar_type(),
        "key_cache, value_cache: expected CPU tensors of four dimensions and one dtype");
  const bool paged = block_table.has_value();
  for (int i = 0; i < 3; ++i)
    check(key_cache.size(i) == value_cache.size(i), "value_cache: expected the shape of key_cache but for its columns");
  const int64_t nodes = query.size(0), heads = query.size(1), kv_heads = key_cache.size(paged ? 2 : 1);
  check(query.size(2) >= 1 && key_cache.size(3) == query.size(2), "key_cache: expected D=", query.size(2), " columns");
  check(kv_heads >= 1 && heads % kv_heads == 0, "query: expected a multiple of Hkv=", kv_heads, " heads");
  check(cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1, "cu_nodes: expected [B+1]");
  const int64_t batch = cu_nodes.size(0) - 1;
  check(paged || key_cache.size(0) == batch, "key_cache: expected B=", batch, " rows");
  check(bits.dim() == 2 && bits.size(0) == nodes && 64 * bits.size(1) >= max_nodes,
        "bits: expected [N, ceil(max_nodes/64)]");
  check(shared_groups.has_value() == shared_lens.has_value(), "shared_lens: expected with shared_groups");

  AttentionArgs args{};
  args.query_type = dtype_of("query", query);
  args.cache_type = cache_type(key_cache);
  args.group = heads / kv_heads;
  const Tensor rows = query.stride(2) == 1 || query.size(2) == 1 ? query : torch::stable::contiguous(query);
  args.query = rows.const_data_ptr();
  args.query_node = rows.stride(0);
  args.query_head = rows.stride(1);
  const Floats sink("sinks", sinks, heads), key_scale("k_scale", k_scale, kv_heads),
      value_scale("v_scale", v_scale, kv_heads);
  args.keys = cache_of(key_cache, paged, key_scale.data);
  args.values = cache_of(value_cache, paged, value_scale.data);
  int64_t room = key_cache.size(2);
  MaybeTensor table;
  if (paged) {
    check(block_table->is_cpu() && block_table->dim() == 2 && block_table->size(0) == batch &&
              block_table->scalar_type() == ScalarType::Int && key_cache.size(1) >= 1,
          "block_table: expected a CPU tensor [B, M] int32, and blocks of at least one slot");
    table = torch::stable::contiguous(*block_table);
    args.table = static_cast<const int32_t*>(table->const_data_ptr());
    args.table_width = table->size(1);
    args.pages = key_cache.size(0);
    args.page = key_cache.size(1);
    room = args.pages == 0 ? 0 : args.table_width * args.page;
  }
  const Values<int32_t> depth("depths", depths, ScalarType::Int, {nodes}),
      starts("cu_nodes", cu_nodes, ScalarType::Int, {batch + 1}),
      prefixes("prefix_lens", prefix_lens, ScalarType::Int, {batch}),
      groups("shared_groups", shared_groups, ScalarType::Int, {batch}),
      lengths("shared_lens", shared_lens, ScalarType::Int, {batch});
  const Values<uint64_t> words("bits", bits, ScalarType::Long, {nodes, bits.size(1)});
  args.depths = depth.data;
  args.bits = words.data;
  args.words = bits.size(1);
  args.scale = scale;
  args.softcap = softcap == 0.0 ? 0.0 : std::max(softcap, 1e-30);  // not 0 in fp32, which would be off
  args.window = std::clamp<int64_t>(window, 0, int64_t{1} << 33);  // more than any two positions can differ
  args.sinks = sink.data;
  args.query_heads = heads;
  const int64_t columns = (std::max(args.keys.columns, args.values.columns) + 31) / 32 * 32;
  args.job_rows = std::clamp<int64_t>(kJobElements / columns / 32 * 32, 32, 256);
  args.partial_stride = (args.values.columns + 15) / 16 * 16 + 16;

  Tensor out = torch::stable::new_empty(query, {nodes, heads, args.values.columns});
  Tensor lse = torch::stable::new_empty(query, {nodes, return_lse ? heads : 0}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;

  std::vector<AttentionPlan::Request> requests;
  int64_t first = 0, covered = 0, work = 0;
  const auto leave_empty = [&](int64_t from, int64_t to) {
    const int64_t bytes = heads * args.values.columns * static_cast<int64_t>(query.element_size());
    std::fill_n(static_cast<char*>(args.out) + from * bytes, (to - from) * bytes, 0);
    if (return_lse) std::fill(args.lse + from * heads, args.lse + to * heads, -std::numeric_limits<float>::infinity());
  };
  for (int64_t b = 0; b < batch; ++b) {
    // Bounds hold for any numbers; whether they make sense is checked under SPECDEC_DEBUG.
    first = std::clamp<int64_t>(starts.data[b], first, nodes);
    const int64_t end = std::clamp<int64_t>(starts.data[b + 1], first, nodes);
    const int64_t size = std::min({end - first, std::max<int64_t>(max_nodes, 0), room});
    if (size == 0) continue;
    leave_empty(covered, first);
    covered = first + size;
    AttentionPlan::Request r = {-1, b, first, size, std::clamp<int64_t>(prefixes.data[b], 0, room - size), 0, 0};
    if (groups.data != nullptr) {
      r.shared = std::clamp<int64_t>(lengths.data[b], 0, r.prefix);
      r.source = groups.data[b] >= 0 && groups.data[b] < batch ? groups.data[b] : b;
      if (r.shared == 0) r.source = -1;
    }
    if (args.window > 0) {
      r.lowest = r.prefix;
      for (int64_t i = 0; i < size; ++i)
        r.lowest = std::min<int64_t>(r.lowest, r.prefix + depth.data[first + i] - args.window + 1);
      r.lowest = std::max<int64_t>(r.lowest, 0);
    }
    work += size * heads * (r.prefix + size - r.lowest) * (args.keys.columns + args.values.columns);
    requests.push_back(r);
  }
  leave_empty(covered, nodes);
  if (requests.empty() || heads == 0) return {out, lse};
  const int64_t threads = std::clamp<int64_t>(work / kWorkPerThread, 1, torch::stable::get_num_threads());
  AttentionPlan(args, std::move(requests), kv_heads, threads).run(query);
  return {out, lse};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) { m.impl("tree_attention", TORCH_BOX(&specdec::tree_attention)); }
