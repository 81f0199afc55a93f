// Compaction of KV caches: where slots lie, and how one column of them moves. Plain C++ that host and device share, so
// that the addresses are tested where there is no GPU.
#pragma once

#include <cstdint>

#include "specdec/macros.h"

namespace specdec::kv {

struct alignas(16) Bytes16 {
  uint64_t low, high;
};

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

// What one launch is told, in the parameters of the kernel: no copy to the device, and a CUDA graph keeps it. Layers of
// one model mostly share their geometry, so a cache costs nine bytes of the 4 KB that every driver allows.
constexpr int kGeometries = 8;
constexpr int kCaches = 384;

struct Launch {
  Paths paths;
  Geometry geometries[kGeometries];
  char* caches[kCaches];
  uint8_t kinds[kCaches];  // index into geometries
  int32_t num_geometries, num_caches;
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters are limited to 4 KB");

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

// Adds a cache to a launch; false where the launch is full.
inline bool add(Launch& launch, char* data, const Geometry& geometry) {
  if (launch.num_caches == kCaches) return false;
  int kind = 0;
  while (kind < launch.num_geometries && !(launch.geometries[kind] == geometry)) ++kind;
  if (kind == launch.num_geometries) {
    if (kind == kGeometries) return false;
    launch.geometries[launch.num_geometries++] = geometry;
  }
  launch.caches[launch.num_caches] = data;
  launch.kinds[launch.num_caches++] = static_cast<uint8_t>(kind);
  return true;
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

// Moves one column, the vector at `offset` bytes into every slot of the path of request b.
//
// Nodes ascend along a path, so nodes[j] >= j, and a step writes slot j when all later steps read slots above nodes[j].
// Steps in order therefore never overwrite what is still to be read, although sources and targets overlap. No other
// thread touches the column. Reading several steps before writing them keeps several loads under way.
template <typename Vector>
SPECDEC_HD void move_column(const Paths& paths, const Geometry& g, char* cache, int32_t b, int64_t offset) {
  constexpr int kAhead = 4;
  const int32_t* nodes = paths.nodes + b * paths.nodes_stride;
  const int64_t prefix = paths.prefix_lens[b * paths.prefix_stride];
  bool ended = paths.steps < 1 || nodes[0] < 0;
  for (int32_t first = 1; first < paths.steps && !ended; first += kAhead) {
    Vector held[kAhead];
    Vector* target[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      target[i] = nullptr;
      const int32_t step = first + i;
      if (ended || step >= paths.steps) continue;
      const int32_t node = nodes[step * paths.nodes_step];
      ended = node < 0;
      if (ended || node == step) continue;
      const char* from = slot_address(paths, g, cache, b, prefix + node);
      char* to = slot_address(paths, g, cache, b, prefix + step);
      if (from == nullptr || to == nullptr) continue;
      held[i] = *reinterpret_cast<const Vector*>(from + offset);
      target[i] = reinterpret_cast<Vector*>(to + offset);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (target[i] != nullptr) *target[i] = held[i];
    }
  }
}

// Moves column `item` of cache `c` for request b; items run over vectors, then heads.
SPECDEC_HD void move_item(const Launch& launch, int32_t c, int32_t b, int64_t item) {
  const Geometry& g = launch.geometries[launch.kinds[c]];
  char* cache = launch.caches[c];
  const int64_t offset = item / g.vectors * g.head + item % g.vectors * g.vector;
  switch (g.width) {
    case 16:
      return move_column<Bytes16>(launch.paths, g, cache, b, offset);
    case 8:
      return move_column<uint64_t>(launch.paths, g, cache, b, offset);
    case 4:
      return move_column<uint32_t>(launch.paths, g, cache, b, offset);
    case 2:
      return move_column<uint16_t>(launch.paths, g, cache, b, offset);
    default:
      return move_column<uint8_t>(launch.paths, g, cache, b, offset);
  }
}

SPECDEC_HD int64_t num_items(const Launch& launch, int32_t c) {
  const Geometry& g = launch.geometries[launch.kinds[c]];
  return static_cast<int64_t>(g.heads) * g.vectors;
}

}  // namespace specdec::kv
