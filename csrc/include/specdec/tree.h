#pragma once

#include <stdint.h>

#include "macros.h"
#include "numerics.h"
#include "philox.h"

// One request's drafted tree, its random numbers and its lossy rules, as the walks see them.

namespace specdec {

/// Node 0 is the root. Tokens that are no id are no drafts: no link leads to them. Without links it is a chain.
struct Tree {
  const int32_t* tokens;        // [nodes]
  const int32_t* parents;       // [nodes], null: a chain
  const int32_t* first_child;   // [nodes], -1: none
  const int32_t* next_sibling;  // [nodes], -1: none
  const int32_t* counts;        // [nodes] how many draws were merged in a node, null: one
  int nodes;
  int max_depth;
  int64_t vocabulary;

  SPECDEC_HD bool usable(int node) const { return tokens[node] >= 0 && tokens[node] < vocabulary; }
  SPECDEC_HD int parent(int node) const { return parents ? parents[node] : node - 1; }
  SPECDEC_HD int first(int node) const {
    if (first_child) return first_child[node];
    return node + 1 < nodes && usable(node + 1) ? node + 1 : -1;
  }
  SPECDEC_HD int next(int node) const { return next_sibling ? next_sibling[node] : -1; }
  SPECDEC_HD int draws(int node) const { return counts && counts[node] > 1 ? counts[node] : 1; }
};

/// Children of each node in node order. Whatever stands in `parents`, links go from lower to higher nodes.
SPECDEC_HD void link_children(const Tree& tree, int32_t* first_child, int32_t* next_sibling) {
  for (int node = tree.nodes - 1; node >= 0; --node) {
    first_child[node] = next_sibling[node] = -1;
  }
  for (int node = tree.nodes - 1; node > 0; --node) {
    const int32_t parent = tree.parents[node];
    if (parent < 0 || parent >= node || !tree.usable(node)) continue;
    next_sibling[node] = first_child[parent];
    first_child[parent] = node;
  }
}

/// Uniform numbers of one request: given ones, or Philox.
struct Coins {
  const float* accept_uniforms;  // of the request's first node, or null
  const float* final_uniform;    // or null
  uint64_t seed;
  uint64_t offset;

  /// `repeat`: how many earlier draws hit the same node.
  SPECDEC_HD float accept(int node, int repeat = 0) const {
    if (accept_uniforms && repeat == 0) return accept_uniforms[node];
    return coin(philox_word(seed, offset, kAcceptStream, static_cast<uint32_t>(node), static_cast<uint64_t>(repeat)));
  }
  SPECDEC_HD float order(int parent, int step) const {
    return coin(philox_word(seed, offset, kOrderStream, static_cast<uint32_t>(parent), static_cast<uint64_t>(step)));
  }
  SPECDEC_HD float last() const {
    return final_uniform ? *final_uniform : coin(philox_word(seed, offset, kFinalStream, 0, 0));
  }
};

/// Rules that change the output law; these defaults are off.
struct Lossy {
  const bool* judge = nullptr;       // of the request's first node: accepted whatever the rule says (arXiv 2501.19309)
  const float* synthetic = nullptr;  // [max_depth] rates at which load tests accept
  float lenience = 1.0f;             // accept iff u * lenience * q < p

  SPECDEC_HD bool judged(int node) const { return judge && judge[node]; }
  SPECDEC_HD bool accepts(float u, float q, float p, int node) const {
    return specdec::accepts(u, rounded_product(lenience, q), p) || judged(node);
  }
};

/// The draws at a node, one after another: its children in node order, or merged draws in a uniformly random order
/// (i.i.d. draws are exchangeable, so that has the law of the order which merging forgot).
template <class Rows>
struct Draws {
  Rows& rows;
  const Tree& tree;
  const Coins& coins;
  const int node;
  int total = 0;   // draws at this node
  int child = -1;  // of the current draw
  int repeat = 0;  // earlier draws that hit the same child

  SPECDEC_HD Draws(Rows& rows, const Tree& tree, const Coins& coins, int node)
      : rows(rows), tree(tree), coins(coins), node(node) {
    for (int c = tree.first(node); c >= 0; c = tree.next(c)) {
      total += tree.draws(c);
      if (tree.counts) rows.set_mark(c, 0);
    }
  }

  SPECDEC_HD bool more() const { return step_ < total; }

  SPECDEC_HD bool next() {
    if (!more()) return false;
    if (!tree.counts) {
      child = step_++ == 0 ? tree.first(node) : tree.next(child);
      return true;
    }
    const int left = total - step_;
    int ticket = static_cast<int>(rounded_product(coins.order(node, step_++), static_cast<float>(left)));
    if (ticket > left - 1) ticket = left - 1;
    for (child = tree.first(node);; child = tree.next(child)) {
      repeat = rows.mark(child);
      ticket -= tree.draws(child) - repeat;
      if (ticket < 0) break;
    }
    rows.set_mark(child, repeat + 1);
    return true;
  }

 private:
  int step_ = 0;
};

}  // namespace specdec
