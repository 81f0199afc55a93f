// Verification on CUDA: what one launch is told, and how its scratch memory is laid out. Plain C++, so that the device
// code also runs where there is no GPU (tests/cuda_host.h).
#pragma once

#include <cstdint>

#include "specdec/traversal.h"

namespace specdec::device {

// A warp reads rows in blocks of this many columns. What is summed within a block, and the order in which blocks are
// summed, depends on nothing else, so neither the batch nor the number of thread blocks changes a bit of any result.
constexpr int kBlock = 1024;

constexpr int kLanes = 32;
constexpr int kThreads = 8 * kLanes;  // of a thread block: six warps that read rows, one that serves, one that walks

// Bins of a pass that looks for a filter's threshold; every thread sums into bins of its own.
constexpr int kBins = 16;

// Shared memory of a warp that reads rows, in bytes: a block's draft probabilities, or its threads' bins.
constexpr int kTile = 4096;
static_assert(kBlock * sizeof(float) <= kTile && kBins * kLanes * sizeof(uint64_t) <= kTile, "a tile serves both");

enum class DType : int32_t { kFloat, kBf16, kHalf };

// The rows of one model's logits, and how they become distributions.
struct Side {
  const char* data;              // null: no logits
  const char* mixed;             // logits that are mixed in, of the same type, or null
  int64_t stride, mixed_stride;  // bytes from row to row
  float mix;                     // a logit is (1 - mix) * its own + mix * the other's
  DType type;
  int64_t columns;
  int64_t vocabulary;       // ids outside are no tokens
  const int32_t* ids;       // [columns] ascending target ids of a trimmed vocabulary, null: column v is token v
  const uint32_t* allowed;  // [nodes, words] bit masks over target ids, null: all are allowed
  int64_t allowed_stride;   // words
  const float* params;      // [batch, 4] temperature, top_k, top_p, min_p; null: `common` for all
  float common[4];

  SPECDEC_HD int blocks() const { return static_cast<int>((columns + kBlock - 1) / kBlock); }
};

// Memory of a call; sizes follow from shapes. A team is the thread blocks that share a request.
struct Scratch {
  uint32_t* arrivals;  // [batch, kArrivalStride], zeroed: thread blocks that reached the team's barrier so far
  double* sums;        // [batch, 2, sums_size]: of the blocks of a pass, and of the pass before
  uint64_t* bins;      // [batch, 2, team, kBins] if there may be filters: of a pass, and of the pass before
  int32_t* links;      // [batch, 2, max_nodes] in trees: first child and next sibling
  int32_t* excluded;   // [batch, team, 2, max_nodes]: tokens, and the draft's columns of them
  int32_t* marks;      // [batch, team, max_nodes] where nodes are marked
  Frame* frames;       // [batch, team, max_depth + 1] for traversal
  int64_t sums_size;
};
constexpr int kArrivalStride = 8;  // 32 bytes: the barriers of two teams share no sector

enum : int { kTarget = 0, kDraft = 1 };

struct Launch {
  Side sides[2];
  const int32_t* tokens;    // [nodes]
  const int32_t* parents;   // [nodes], null: chains
  const int32_t* cu_nodes;  // [batch + 1]
  const int32_t* counts;    // [nodes] or null
  const bool* judge;        // [nodes] or null
  const float* synthetic;   // [max_depth] or null
  float lenience;
  const int64_t* seed;           // [batch] or null
  const int64_t* offset;         // [batch] or null
  const float* accept_uniforms;  // [nodes] or null
  const float* final_uniforms;   // [batch] or null
  int32_t* out_tokens;           // [batch, max_depth + 1]
  int32_t* out_nodes;            // the same
  int32_t* out_number;           // [batch]
  float* out_logprobs;           // [batch, max_depth + 1] or null
  int64_t nodes;
  int64_t vocabulary;
  int32_t batch, max_nodes, max_depth;
  int32_t team;  // thread blocks of a request
  Scratch scratch;
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters are limited to 4 KB");

// Whether some request may filter: only the device knows what a tensor holds.
inline bool may_filter(const Side& side) {
  return side.data && (side.params || side.common[1] > 0.0f || side.common[2] < 1.0f || side.common[3] > 0.0f);
}

// Lays the scratch of `launch` out from `base` on, which may be null; returns its bytes. The first `zeroed` bytes must
// be zero.
inline int64_t lay_out(Launch& launch, Method method, char* base, int64_t* zeroed) {
  int64_t used = 0;
  auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  };
  Scratch& s = launch.scratch;
  const int64_t batch = launch.batch, teams = batch * launch.team;
  const Side& drafts = launch.sides[kDraft];
  const int64_t target = launch.sides[kTarget].blocks(), draft = drafts.data ? drafts.blocks() : 0;
  // 8 bytes for each block that open() reads, 16 for each of an overlap.
  s.sums_size = target + (draft > target ? draft : target);
  const bool filters = may_filter(launch.sides[kTarget]) || may_filter(drafts);
  const bool traversal = method == Method::kTraversal || method == Method::kTraversalIid;
  take(s.arrivals, launch.team > 1 ? batch * kArrivalStride : 0);
  *zeroed = used;
  take(s.sums, batch * 2 * s.sums_size);
  take(s.bins, filters ? teams * 2 * kBins : 0);
  take(s.links, launch.parents ? batch * 2 * launch.max_nodes : 0);
  take(s.excluded, teams * 2 * launch.max_nodes);
  take(s.marks, launch.counts || method == Method::kTypical ? teams * launch.max_nodes : 0);
  take(s.frames, traversal ? teams * (launch.max_depth + 1) : 0);
  return used;
}

}  // namespace specdec::device
