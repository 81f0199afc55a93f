// Which slots a node sees. For tier files only.
#pragma once

#include "attention.h"
#include "simd.h"

namespace specdec::SPECDEC_TIER {

// The slots from `from` to `to` of a block, as bits.
SPECDEC_INLINE uint64_t slots_between(int64_t from, int64_t to) {
  if (from < 0) from = 0;
  if (to > kAttentionBlock) to = kAttentionBlock;
  if (from >= to) return 0;
  return (to == kAttentionBlock ? ~uint64_t{0} : (uint64_t{1} << to) - 1) & ~((uint64_t{1} << from) - 1);
}

// The first slot of the prefix that a window leaves to a node.
SPECDEC_INLINE int64_t first_seen(const AttentionArgs& args, const AttentionJob& job, const AttentionNode& node) {
  int64_t first = job.first_slot;
  if (!job.shared && node.shared > first) first = node.shared;
  if (args.window == 0) return first;
  const int64_t reach = node.prefix + args.depths[node.node] - args.window + 1;
  return reach > first ? reach : first;
}

SPECDEC_INLINE int64_t prefix_end(const AttentionJob& job, const AttentionNode& node) {
  const int64_t end = job.shared ? node.shared : node.prefix;
  return end < job.last_slot ? end : job.last_slot;
}

// Which slots of the block at `start` a node sees.
inline uint64_t seen_slots(const AttentionArgs& args, const AttentionJob& job, const AttentionNode& node,
                           int64_t start) {
  uint64_t seen = slots_between(first_seen(args, job, node) - start, prefix_end(job, node) - start);
  if (job.shared || start + kAttentionBlock <= node.prefix) return seen;
  const uint64_t* words = args.bits + node.node * args.words;
  const int64_t j = start - node.prefix;  // the tree's node at the block's first slot
  uint64_t tree = 0;
  if (j < 0) {
    tree = words[0] << -j;
  } else {
    const int64_t word = j / 64, shift = j % 64;
    if (word < args.words) tree = words[word] >> shift;
    if (shift != 0 && word + 1 < args.words) tree |= words[word + 1] << (64 - shift);
  }
  const int64_t low = node.prefix > job.first_slot ? node.prefix : job.first_slot;
  const int64_t end = node.prefix + node.size, high = end < job.last_slot ? end : job.last_slot;
  tree &= slots_between(low - start, high - start);
  // Positions, not slots: siblings stand at different slots but at one distance.
  if (args.window != 0) {
    const int64_t depth = args.depths[node.node];
    for (uint64_t left = tree; left != 0; left &= left - 1) {
      const int bit = __builtin_ctzll(left);
      if (depth - args.depths[node.first + j + bit] >= args.window) tree &= ~(uint64_t{1} << bit);
    }
  }
  return seen | tree;
}

}  // namespace specdec::SPECDEC_TIER
