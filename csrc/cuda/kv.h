// Compaction of KV caches on CUDA: what a launch is told, and how one column of slots moves. Plain C++ that host and
// device share, so that it is tested where there is no GPU.
#pragma once

#include "specdec/kv.h"

namespace specdec::kv {

struct alignas(16) Bytes16 {
  uint64_t low, high;
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
