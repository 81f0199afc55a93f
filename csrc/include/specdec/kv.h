// Where the slots of a KV cache lie: addresses from sizes, strides and block tables, shared by CPU and CUDA.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace specdec::kv {

// How the slots of one cache lie in memory; strides are in bytes.
struct Geometry {
  int64_t outer;   // stride between requests (dense) or blocks (paged)
  int64_t slot;    // between slots
  int64_t head;    // between KV heads
  int64_t vector;  // between the vectors of one head's row
  int64_t outers;  // requests or blocks
  int64_t slots;   // slots of a request or of a block
  int32_t heads;
  int32_t vectors;  // vectors of one row
  int32_t width;    // bytes of a vector: 1, 2, 4, 8 or 16
};

inline bool operator==(const Geometry& a, const Geometry& b) {
  return a.outer == b.outer && a.slot == b.slot && a.head == b.head && a.vector == b.vector && a.outers == b.outers &&
         a.slots == b.slots && a.heads == b.heads && a.vectors == b.vectors && a.width == b.width;
}

// Accepted paths of a batch; strides are in elements.
struct Paths {
  const int32_t* nodes;        // [batch, steps], -1 behind the end
  const int32_t* prefix_lens;  // [batch]
  const int32_t* block_table;  // [batch, table_width], or null: dense caches
  int64_t nodes_stride, nodes_step, prefix_stride, table_stride, table_step;
  int32_t batch, steps, table_width;
};

// Geometry of a cache of shape [B, Hkv, L, D], or [blocks, block_size, Hkv, D] where `paged`. Rows move in the widest
// vectors that their alignment allows; a row whose elements do not touch moves element by element.
inline Geometry geometry_of(const void* data, const int64_t* sizes, const int64_t* strides, int64_t itemsize,
                            bool paged) {
  const int slot = paged ? 1 : 2, head = paged ? 2 : 1;
  const bool whole = sizes[3] <= 1 || strides[3] == 1;
  const int64_t run = whole ? sizes[3] * itemsize : itemsize;
  Geometry g{};
  g.outer = strides[0] * itemsize;
  g.slot = strides[slot] * itemsize;
  g.head = strides[head] * itemsize;
  g.outers = sizes[0];
  g.slots = sizes[slot];
  g.heads = static_cast<int32_t>(sizes[head]);
  uint64_t alignment = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(run);
  for (int i = 0; i < (whole ? 3 : 4); ++i) {
    // The stride of a dimension of size 1 never enters an address.
    if (sizes[i] > 1) alignment |= static_cast<uint64_t>(strides[i] * itemsize);
  }
  g.width = 16;
  while (alignment % g.width != 0) g.width /= 2;
  g.vector = whole ? g.width : strides[3] * itemsize;
  g.vectors = static_cast<int32_t>(whole ? run / g.width : sizes[3]);
  return g;
}

// Where `slot` of request b starts, or null where there is no such slot.
SPECDEC_HD char* slot_address(const Paths& paths, const Geometry& g, char* cache, int32_t b, int64_t slot) {
  if (slot < 0) return nullptr;
  int64_t outer = b;
  if (paths.block_table != nullptr) {
    // 32-bit division is several times as fast; a request has fewer than 2^31 slots.
    if (slot > INT32_MAX || g.slots <= 0) return nullptr;
    const uint32_t size = static_cast<uint32_t>(g.slots < INT32_MAX ? g.slots : INT32_MAX);
    const uint32_t logical = static_cast<uint32_t>(slot) / size;
    if (logical >= static_cast<uint32_t>(paths.table_width)) return nullptr;
    outer = paths.block_table[b * paths.table_stride + logical * paths.table_step];
    slot -= static_cast<int64_t>(logical) * size;
  }
  if (outer < 0 || outer >= g.outers || slot >= g.slots) return nullptr;
  return cache + outer * g.outer + slot * g.slot;
}

}  // namespace specdec::kv
