// tree_layout on the CPU: one pass over the nodes, each of which continues its parent's row. A row is a word or a few,
// so there is nothing here for tiers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "specdec/layout.h"

namespace specdec::layout {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Words of ancestor bits that are worth waking a thread for.
constexpr int64_t kWordsPerTask = 1 << 13;

void lay_out(const Launch& launch, int64_t tree, int64_t first, int64_t size) {
  const int64_t words = launch.words, count = within_bounds(launch, size);
  for (int64_t node = 0; node < count; ++node) {
    const int64_t parent = parent_of(launch, first, node);
    int64_t* row = launch.bits + (first + node) * words;
    int32_t depth = 0;
    if (parent >= 0) {
      depth = launch.depths[first + parent] + 1;
      std::copy_n(launch.bits + (first + parent) * words, words, row);
    } else {
      std::fill_n(row, words, 0);
    }
    row[node / 64] |= static_cast<int64_t>(uint64_t{1} << (node % 64));
    place(launch, tree, first + node, depth);
  }
  for (int64_t node = count; node < size; ++node) clear(launch, first + node);
}

const int32_t* int32_data(const char* name, const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Int, name, ": expected int32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected [", size, "]");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> tree_layout(Tensor parents, Tensor cu_nodes, int64_t max_nodes,
                                               std::optional<Tensor> prefix_lens) {
  STD_TORCH_CHECK(parents.dim() == 1 && cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1 && max_nodes >= 1,
                  "tree_layout: expected parents [N], cu_nodes [B+1] and max_nodes >= 1");
  Launch launch{};
  launch.nodes = parents.size(0);
  launch.batch = cu_nodes.size(0) - 1;
  launch.max_nodes = max_nodes;
  launch.words = (max_nodes + 63) / 64;
  launch.parents = int32_data("parents", parents, launch.nodes);
  launch.parents_stride = parents.stride(0);
  launch.cu_nodes = int32_data("cu_nodes", cu_nodes, launch.batch + 1);
  launch.cu_nodes_stride = cu_nodes.stride(0);
  if (prefix_lens && launch.batch > 0) {
    launch.prefix_lens = int32_data("prefix_lens", *prefix_lens, launch.batch);
    launch.prefix_stride = prefix_lens->stride(0);
  }
  Tensor depths = torch::stable::new_empty(parents, {launch.nodes});
  Tensor bits = torch::stable::new_empty(parents, {launch.nodes, launch.words}, ScalarType::Long);
  Tensor positions = torch::stable::new_empty(parents, {launch.nodes});
  launch.depths = static_cast<int32_t*>(depths.mutable_data_ptr());
  launch.bits = static_cast<int64_t*>(bits.mutable_data_ptr());
  launch.positions = static_cast<int32_t*>(positions.mutable_data_ptr());

  std::vector<int64_t> starts(static_cast<size_t>(launch.batch + 1));
  for (int64_t b = 0; b <= launch.batch; ++b) {
    starts[b] = std::max(start_of(launch, b), b > 0 ? starts[b - 1] : 0);
  }
  for (int64_t row = 0; row < starts.front(); ++row) clear(launch, row);
  for (int64_t row = starts.back(); row < launch.nodes; ++row) clear(launch, row);
  const int64_t words = launch.nodes * launch.words;
  const int64_t grain = std::max<int64_t>(1, kWordsPerTask * launch.batch / std::max<int64_t>(words, 1));
  torch::stable::parallel_for(0, launch.batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) lay_out(launch, b, starts[b], starts[b + 1] - starts[b]);
  });
  return {depths, bits, positions};
}

}  // namespace
}  // namespace specdec::layout

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, m) { m.impl("tree_layout", TORCH_BOX(&specdec::layout::tree_layout)); }
