#pragma once

#include <stdint.h>

#include "macros.h"
#include "numerics.h"
#include "philox.h"

// Verification as scalar walks over rows of logits: which rows are read, what is accepted, where the last token comes
// from. What is as wide as the vocabulary is left to a `Rows`, written once per backend:
//
//   bool  open(int node, bool drafted)   makes row `node` of the target current and, if `drafted`, that of the draft:
//                                        their lse (and filter threshold); false if one holds NaN, +inf or nothing
//                                        finite
//   float target(int token)              p(token)
//   float draft(int token)               q(token); where drafts have no distribution, q is 1 at this token from then on
//   float residual_mass(float c)         sum of (p - c q)+
//   int   draw(float c, float u)         inverse CDF of (p - c q)+ in vocabulary order; residual_mass(c) came before it
//                                        unless c is 0
//   int   top(int node)                  the largest logit of the target's row, lowest id among equals; -1 if broken
//   float logprob(int token)             log p(token) of the row opened last
//
// On a device every thread of a group runs the walk and the primitives are collective.

namespace specdec {

/// What is left of p after rejections: (p - c q)+ / m. Every exact verifier's residual has this form.
struct Residual {
  float c = 0.0f;
  float m = 1.0f;

  SPECDEC_HD float at(float p, float q) const { return excess(p, c, q) / m; }

  /// After a rejection. `scale` is the path weight times the draft mass not yet drawn (1 for i.i.d. draws of a chain).
  /// A residual without mass has probability 0, but rounding may reach it: then p stands in.
  template <class Rows>
  SPECDEC_HD void reject(Rows& rows, float scale) {
    c += m / scale;
    m = rows.residual_mass(c);
    if (!(m > 0.0f)) *this = Residual{};
  }
};

/// Uniform numbers of one request: given ones, or Philox.
struct Coins {
  const float* accept_uniforms;  // of the request's first node, or null
  const float* final_uniform;    // or null
  uint64_t seed;
  uint64_t offset;

  SPECDEC_HD float accept(int node) const {
    if (accept_uniforms) return accept_uniforms[node];
    return coin(philox_word(seed, offset, kAcceptStream, static_cast<uint32_t>(node), 0));
  }
  SPECDEC_HD float last() const {
    return final_uniform ? *final_uniform : coin(philox_word(seed, offset, kFinalStream, 0, 0));
  }
};

/// One chain: node 0 is the root, the others are drafts.
struct Chain {
  const int32_t* tokens;  // [nodes]
  int nodes;
  int64_t vocabulary;

  /// The draft after `node`, or -1 where there is none: at the end, and before a token that is no id.
  SPECDEC_HD int32_t draft_after(int node) const {
    if (node + 1 >= nodes) return -1;
    const int32_t token = tokens[node + 1];
    return token >= 0 && token < vocabulary ? token : -1;
  }
};

/// Where the outcome of a walk goes, max_depth + 1 entries each; `logprobs` may be null.
struct Path {
  int32_t* tokens;
  int32_t* nodes;
  float* logprobs;

  template <class Rows>
  SPECDEC_HD void emit(Rows& rows, int node, int32_t token) {
    tokens[node] = token;
    nodes[node] = node;
    if (logprobs) logprobs[node] = rows.logprob(token);
  }
};

/// Token-wise verification (Leviathan et al., arXiv 2211.17192). Returns the number of tokens emitted, 0 if a row that
/// was read is broken; the entries of `path` beyond that number are unspecified.
template <class Rows>
SPECDEC_HD int walk_chain(Rows& rows, const Chain& chain, const Coins& coins, Path path) {
  for (int node = 0;; ++node) {
    const int32_t token = chain.draft_after(node);
    if (!rows.open(node, token >= 0)) return 0;
    Residual rest;
    if (token >= 0) {
      const float q = rows.draft(token);
      if (accepts(coins.accept(node + 1), q, rest.at(rows.target(token), q))) {
        path.emit(rows, node, token);
        continue;
      }
      rest.reject(rows, 1.0f);
    }
    path.emit(rows, node, rows.draw(rest.c, coins.last()));
    return node + 1;
  }
}

/// Greedy verification: drafts that are the target's argmax are accepted. Reads no draft row.
template <class Rows>
SPECDEC_HD int walk_chain_greedy(Rows& rows, const Chain& chain, Path path) {
  for (int node = 0;; ++node) {
    const int32_t top = rows.top(node);
    if (top < 0) return 0;
    path.emit(rows, node, top);
    if (chain.draft_after(node) != top) return node + 1;
  }
}

}  // namespace specdec
