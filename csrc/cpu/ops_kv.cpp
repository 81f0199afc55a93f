// compact_kv_ on the CPU: the accepted path of every request, through the caches of all layers. Rows are copied whole,
// which memcpy does as fast as memory allows; there is nothing here for tiers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "specdec/kv.h"

namespace specdec::kv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes that are worth waking a thread for.
constexpr int64_t kBytesPerTask = 1 << 16;
// Steps whose addresses are held at a time.
constexpr int32_t kHeld = 32;
// Bytes of a cache line, and of a row that are fetched ahead.
constexpr int64_t kLine = 64, kAhead = 8 * kLine;

struct Cache {
  char* data;
  Geometry geometry;
  int64_t row;  // bytes that lie side by side
};

struct Move {
  const char* from;
  char* to;
};

Cache cache_of(const Tensor& tensor, bool paged) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  Geometry g = geometry_of(data, tensor.sizes().data(), tensor.strides().data(),
                           static_cast<int64_t>(tensor.element_size()), paged);
  int64_t row = g.width;
  if (g.vector == row) {  // vectors touch: a row in one piece, and all heads in one where they touch as well
    row *= g.vectors;
    g.vectors = 1;
    if (g.head == row) {
      row *= g.heads;
      g.heads = 1;
    }
  }
  return {data, g, row};
}

// The cores' own prefetchers do not see rows coming that are far apart; what follows within a row they do.
void prefetch(const Move& move, int64_t offset, int64_t bytes) {
  for (int64_t line = 0; line < std::min(bytes, kAhead); line += kLine) {
    __builtin_prefetch(move.from + offset + line, 0);
    __builtin_prefetch(move.to + offset + line, 1);
  }
}

// Nodes ascend along a path, so nodes[j] >= j, and a step writes slot j when all later steps read slots above nodes[j]:
// steps in order never overwrite what is still to be read, although sources and targets overlap.
void move_rows(const Cache& cache, const Move* moves, int32_t count) {
  const Geometry& g = cache.geometry;
  for (int32_t head = 0; head < g.heads; ++head) {
    const int64_t offset = head * g.head;
    for (int32_t i = 0; i < count; ++i) {
      if (head + 1 < g.heads) {
        prefetch(moves[i], offset + g.head, cache.row);
      } else if (i + 1 < count) {
        prefetch(moves[i + 1], offset, cache.row);
      }
      const char* from = moves[i].from + offset;
      char* to = moves[i].to + offset;
      for (int32_t v = 0; v < g.vectors; ++v) std::memcpy(to + v * g.vector, from + v * g.vector, cache.row);
    }
  }
}

void move_path(const Paths& paths, const Cache& cache, int32_t b) {
  const int32_t* nodes = paths.nodes + b * paths.nodes_stride;
  const int64_t prefix = paths.prefix_lens[b * paths.prefix_stride];
  if (nodes[0] < 0) return;
  Move moves[kHeld];
  int32_t count = 0;
  for (int32_t step = 1; step < paths.steps; ++step) {
    const int32_t node = nodes[step * paths.nodes_step];
    if (node < 0) break;
    if (node == step) continue;
    const char* from = slot_address(paths, cache.geometry, cache.data, b, prefix + node);
    char* to = slot_address(paths, cache.geometry, cache.data, b, prefix + step);
    if (from == nullptr || to == nullptr) continue;
    moves[count++] = {from, to};
    if (count == kHeld) {
      move_rows(cache, moves, count);
      count = 0;
    }
  }
  move_rows(cache, moves, count);
}

// The public function checks more and says it better; this keeps a caller of the bare op in bounds.
const int32_t* int32_data(const char* name, const Tensor& tensor, int64_t dims, int64_t batch) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Int, name, ": expected int32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.size(0) == batch, name, ": expected ", dims,
                  " dimensions, B = ", batch);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void compact_kv_(std::vector<Tensor> caches, Tensor nodes, Tensor prefix_lens, std::optional<Tensor> block_table) {
  STD_TORCH_CHECK(nodes.dim() == 2, "nodes: expected 2 dimensions, got ", nodes.dim());
  const int64_t batch = nodes.size(0);
  Paths paths{};
  paths.nodes = int32_data("nodes", nodes, 2, batch);
  paths.nodes_stride = nodes.stride(0);
  paths.nodes_step = nodes.stride(1);
  paths.prefix_lens = int32_data("prefix_lens", prefix_lens, 1, batch);
  paths.prefix_stride = prefix_lens.stride(0);
  paths.batch = static_cast<int32_t>(batch);
  paths.steps = static_cast<int32_t>(nodes.size(1));
  if (block_table) {
    paths.block_table = int32_data("block_table", *block_table, 2, batch);
    paths.table_stride = block_table->stride(0);
    paths.table_step = block_table->stride(1);
    paths.table_width = static_cast<int32_t>(block_table->size(1));
  }
  std::vector<Cache> found;
  found.reserve(caches.size());
  int64_t bytes = 0;
  for (const Tensor& cache : caches) {
    STD_TORCH_CHECK(cache.is_cpu() && cache.dim() == 4, "caches: expected 4 dimensions on the CPU");
    STD_TORCH_CHECK(block_table || cache.size(0) == batch, "caches: expected B = ", batch);
    if (cache.numel() == 0) continue;
    found.push_back(cache_of(cache, block_table.has_value()));
    const Cache& last = found.back();
    bytes += last.row * last.geometry.heads * last.geometry.vectors * std::max(paths.steps - 1, 0);
  }
  // A path of one node is a root, which does not move.
  if (batch == 0 || paths.steps < 2 || found.empty() || (block_table && paths.table_width == 0)) return;
  const int64_t count = static_cast<int64_t>(found.size());
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask * count / std::max<int64_t>(bytes, 1));
  torch::stable::parallel_for(0, count * batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      move_path(paths, found[static_cast<size_t>(unit / batch)], static_cast<int32_t>(unit % batch));
    }
  });
}

}  // namespace
}  // namespace specdec::kv

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) { m.impl("compact_kv_", TORCH_BOX(&specdec::kv::compact_kv_)); }
