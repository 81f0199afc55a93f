// Where the nodes of draft trees stand, as CPU and CUDA take and give it.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace specdec::layout {

// Arguments and outputs of tree_layout; strides are in elements. Outputs are contiguous.
struct Launch {
  const int32_t* parents;      // [nodes], index within the same tree
  const int32_t* cu_nodes;     // [batch + 1]
  const int32_t* prefix_lens;  // [batch], or null: positions are depths
  int64_t parents_stride, cu_nodes_stride, prefix_stride;
  int32_t* depths;     // [nodes]
  int64_t* bits;       // [nodes, words]
  int32_t* positions;  // [nodes]
  int64_t nodes, batch, max_nodes, words;
};

// Whatever cu_nodes holds, in 0..nodes; ascending where the largest so far is taken.
SPECDEC_HD int64_t start_of(const Launch& launch, int64_t tree) {
  const int64_t start = launch.cu_nodes[tree * launch.cu_nodes_stride];
  return start < 0 ? 0 : start < launch.nodes ? start : launch.nodes;
}

// A parent that does not come before its child counts as the node before it, so every walk ends. Below 0: a root.
SPECDEC_HD int64_t parent_of(const Launch& launch, int64_t first, int64_t node) {
  const int64_t parent = launch.parents[(first + node) * launch.parents_stride];
  return parent < node ? parent : node - 1;
}

// How many of a tree's nodes are laid out: what is behind max_nodes is of no tree.
SPECDEC_HD int64_t within_bounds(const Launch& launch, int64_t size) {
  return size < launch.max_nodes ? size : launch.max_nodes;
}

// Positions wrap where a prefix is no length.
SPECDEC_HD void place(const Launch& launch, int64_t tree, int64_t row, int32_t depth) {
  const int32_t prefix = launch.prefix_lens ? launch.prefix_lens[tree * launch.prefix_stride] : 0;
  launch.depths[row] = depth;
  launch.positions[row] = static_cast<int32_t>(static_cast<uint32_t>(prefix) + static_cast<uint32_t>(depth));
}

// A row of no tree, which holds zeros.
SPECDEC_HD void clear(const Launch& launch, int64_t row) {
  launch.depths[row] = launch.positions[row] = 0;
  for (int64_t word = 0; word < launch.words; ++word) launch.bits[row * launch.words + word] = 0;
}

}  // namespace specdec::layout
