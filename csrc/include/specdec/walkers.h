#pragma once

#include <math.h>

#include "rows.h"
#include "tree.h"

// Verification from the root down: a rule decides among the children of a node until it accepts none of them. The rules
// are those of specdec_kernels/reference/rules.py. Each is asked at a node that has children, and returns the child
// that it accepts, or -1: then `rest` weighs the token that is emitted instead.

namespace specdec {

enum class Method : int32_t {
  kGreedy,
  kTargetOnly,
  kMultiRound,
  kWithoutReplacement,
  kKSeq,
  kGreedyMulti,
  kTypical,
  kTraversal,
  kTraversalIid,
};

constexpr float kTypicalEpsilon = 0.09f, kTypicalDelta = 0.3f;  // Medusa, arXiv 2401.10774, section 2.3.1

/// One request.
template <class Rows>
struct Request {
  Rows& rows;
  const Tree& tree;
  const Coins& coins;
  const Lossy& lossy;
};

/// Draw after draw, subtracting what was tried from what is left (SpecInfer, arXiv 2305.09781; without replacement:
/// RSD, 2402.14160). One draw is the chain rule (Leviathan et al., 2211.17192).
template <bool kReplacement>
struct MultiRound {
  static constexpr bool kReadsDraft = true;

  template <class Rows>
  SPECDEC_HD static int pick(const Request<Rows>& r, int node, const Row& p, Row& q, Weight* rest) {
    Residual left;
    Draws<Rows> draws(r.rows, r.tree, r.coins, node);
    while (draws.next()) {
      const int32_t token = r.tree.tokens[draws.child];
      const float chance = drafted(r.rows, q, token);
      const float wanted = left.at(r.rows, p, chance, token);
      if (r.lossy.accepts(r.coins.accept(draws.child, draws.repeat), chance, wanted, draws.child)) return draws.child;
      const double share = left.reject(r.rows, p, q, token, 1.0);
      if (!kReplacement && share > 0.0 && draws.more()) left.remove(r.rows, q, token);
    }
    *rest = left.weight();
    return -1;
  }
};

/// One coin for all siblings: it falls into the running sum of their p, or past it (EAGLE-2, arXiv 2406.16858).
struct TargetOnly {
  static constexpr bool kReadsDraft = false;

  template <class Rows>
  SPECDEC_HD static int pick(const Request<Rows>& r, int node, const Row& p, Row&, Weight*) {
    const float u = r.coins.accept(node);
    float sum = 0.0f;
    for (int child = r.tree.first(node); child >= 0; child = r.tree.next(child)) {
      const int32_t token = r.tree.tokens[child];
      if (!r.rows.excluded(token)) sum += r.rows.target(p, token);
      if (u < sum || r.lossy.judged(child)) return child;
      r.rows.exclude(token);
    }
    return -1;
  }
};

/// Each draw against q scaled by rho, the scale at which k draws lose no mass (SpecTr, arXiv 2310.15141, section 5).
struct KSeq {
  static constexpr bool kReadsDraft = true;

  template <class Rows>
  SPECDEC_HD static int pick(const Request<Rows>& r, int node, const Row& p, Row& q, Weight* rest) {
    Draws<Rows> draws(r.rows, r.tree, r.coins, node);
    if (draws.total == 0) return -1;
    Overlap found;
    const double rho = scale(r.rows, p, q, draws.total, &found);
    while (draws.next()) {
      const int32_t token = r.tree.tokens[draws.child];
      const float scaled = static_cast<float>(rho * r.rows.draft(q, token));
      const float u = r.coins.accept(draws.child, draws.repeat);
      if (r.lossy.accepts(u, scaled, r.rows.target(p, token), draws.child)) return draws.child;
    }
    const double taken = found.both > 0.0 ? reached(found.both, draws.total) / found.both : 0.0;
    *rest = {static_cast<float>(taken), static_cast<float>(taken / rho)};
    return -1;
  }

 private:
  static constexpr double kPrecision = 1e-8;

  /// The probability that one of k draws is accepted, each with probability `both`.
  SPECDEC_HD static double reached(double both, int k) {
    double none = 1.0;
    for (double power = 1.0 - both; k > 0; k /= 2, power *= power)
      if (k % 2 == 1) none *= power;
    return 1.0 - none;
  }

  /// The rho in [1, k] at which reached() = rho * overlap, from above: there the residual cannot be negative.
  template <class Rows>
  SPECDEC_HD static double scale(Rows& rows, const Row& p, const Row& q, int k, Overlap* found) {
    double low = 1.0, high = k, rho = 1.0;
    *found = rows.overlap(p, q, rho);
    if (k == 1 || !(found->both > 0.0)) return rho;
    // Newton's method; a step that leaves the bracket halves it. The excess falls with rho.
    for (int i = 0; i < 64; ++i) {
      const double both = found->both, hit = reached(both, k), excess = hit - rho * both;
      (excess > 0.0 ? low : high) = rho;
      const double fall = -found->capped / rho;  // of the overlap
      const double slope = k * (1.0 - hit) / (1.0 - both) * fall - both - rho * fall;
      double step = rho - excess / slope;
      if (!(step > low && step < high)) step = 0.5 * (low + high);
      const double moved = step > rho ? step - rho : rho - step;
      if (moved < kPrecision * rho || high - low < kPrecision) break;
      rho = step;
      *found = rows.overlap(p, q, rho);
    }
    for (double margin = kPrecision; reached(found->both, k) > rho * found->both && rho < k; margin *= 4.0) {
      rho = rho * (1.0 + margin) < k ? rho * (1.0 + margin) : k;
      *found = rows.overlap(p, q, rho);
    }
    return rho;
  }
};

/// The top k-1 tokens of q and one draw of the rest of q (Hu et al., arXiv 2502.18779). The draw is tested against the
/// rest of q; what that leaves may still give a top token, for which the first sibling's coin decides.
struct GreedyMulti {
  static constexpr bool kReadsDraft = true;

  template <class Rows>
  SPECDEC_HD static int pick(const Request<Rows>& r, int node, const Row& p, Row& q, Weight* rest) {
    Residual left;
    int last = r.tree.first(node);
    for (int child = r.tree.next(last); child >= 0; child = r.tree.next(child)) {
      left.remove(r.rows, q, r.tree.tokens[last]);
      r.rows.exclude(r.tree.tokens[last]);
      last = child;
    }
    const int32_t drawn = r.tree.tokens[last];
    const float chance = drafted(r.rows, q, drawn);
    const float u = r.coins.accept(last);
    if (r.lossy.accepts(u, chance, r.rows.target(p, drawn), last)) return last;
    // Outside the tops, the draw's residual is summed; the tops, of which the rest of q has nothing, keep their p.
    if (q.node >= 0) left.c = 1.0;
    const int32_t gone = q.node < 0 ? drawn : -1;
    if (gone >= 0) r.rows.exclude(gone);
    double mass = r.rows.mass(p, q, left.weight());
    for (int child = r.tree.first(node); child != last; child = r.tree.next(child))
      if (is_new(r.tree, node, child, gone)) mass += r.rows.target(p, r.tree.tokens[child]);
    if (!(mass > 0.0)) {  // has probability 0, but rounding may reach it; then p stands in
      left = Residual{};
      mass = 1.0;
    }
    const float coin_of_tops = r.coins.accept(r.tree.first(node));
    float sum = 0.0f;
    for (int child = r.tree.first(node); child != last; child = r.tree.next(child)) {
      const float target = is_new(r.tree, node, child, gone) ? r.rows.target(p, r.tree.tokens[child]) : 0.0f;
      sum += target / static_cast<float>(mass);
      if (coin_of_tops < sum || r.lossy.judged(child)) return child;
    }
    *rest = left.weight();
    return -1;
  }

 private:
  /// Whether this sibling is the first of its token, and the token is not `gone`.
  SPECDEC_HD static bool is_new(const Tree& tree, int node, int child, int32_t gone) {
    if (tree.tokens[child] == gone) return false;
    for (int c = tree.first(node); c != child; c = tree.next(c))
      if (tree.tokens[c] == tree.tokens[child]) return false;
    return true;
  }
};

/// Walks down by a rule. Returns the number of tokens emitted, 0 if a row that was read is broken.
template <class Rule, class Rows>
SPECDEC_HD int walk_down(const Request<Rows>& r) {
  int node = 0;
  for (int depth = 0;; ++depth) {
    const bool inner = depth < r.tree.max_depth && r.tree.first(node) >= 0;
    Row p{}, q = own_point();
    if (!r.rows.open(node, inner && Rule::kReadsDraft, &p, &q)) return 0;
    Weight rest;
    const int child = inner ? Rule::pick(r, node, p, q, &rest) : -1;
    const int32_t token = child >= 0 ? r.tree.tokens[child] : r.rows.draw(p, q, rest, r.coins.last());
    r.rows.emit(depth, node, token, r.rows.wants_logprobs() ? r.rows.logprob(p, token) : 0.0f);
    if (child < 0) return depth + 1;
    node = child;
  }
}

/// Follows the target's argmax. Reads no draft row; log-probabilities are those of the point mass.
template <class Rows>
SPECDEC_HD int walk_greedy(const Request<Rows>& r) {
  int node = 0;
  for (int depth = 0;; ++depth) {
    const int32_t top = r.rows.top(node);
    if (top < 0) return 0;
    int child = depth < r.tree.max_depth ? r.tree.first(node) : -1;
    while (child >= 0 && r.tree.tokens[child] != top && !r.lossy.judged(child)) child = r.tree.next(child);
    const int32_t token = child >= 0 ? r.tree.tokens[child] : top;
    r.rows.emit(depth, node, token, token == top ? 0.0f : -__builtin_inff());
    if (child < 0) return depth + 1;
    node = child;
  }
}

/// Load tests: accepts at given rates, draws the last token from p. Lossy.
template <class Rows>
SPECDEC_HD int walk_synthetic(const Request<Rows>& r) {
  int node = 0;
  for (int depth = 0;; ++depth) {
    int child = depth < r.tree.max_depth ? r.tree.first(node) : -1;
    if (child >= 0 && !(r.coins.accept(child) < r.lossy.synthetic[depth])) child = -1;
    Row p{}, q = own_point();
    if ((child < 0 || r.rows.wants_logprobs()) && !r.rows.open(node, false, &p, &q)) return 0;
    const int32_t token = child >= 0 ? r.tree.tokens[child] : r.rows.draw(p, q, Weight{}, r.coins.last());
    r.rows.emit(depth, node, token, r.rows.wants_logprobs() ? r.rows.logprob(p, token) : 0.0f);
    if (child < 0) return depth + 1;
    node = child;
  }
}

/// Lossy (Medusa): the longest path on which every token has p(x) > min(eps, delta exp(-H(p))), first among equals.
template <class Rows>
SPECDEC_HD int walk_typical(const Request<Rows>& r) {
  const Tree& tree = r.tree;
  // The mark of a node is the length of the path to it, 0 where that is not kept.
  for (int node = 0; node < tree.nodes; ++node) r.rows.set_mark(node, node == 0);
  int end = 0, length = 1;
  Row p{}, q = own_point();
  for (int node = 0; node < tree.nodes; ++node) {
    const int here = r.rows.mark(node);
    if (here == 0 || here > tree.max_depth || tree.first(node) < 0) continue;
    if (!r.rows.open(node, false, &p, &q)) return 0;
    const float likely = kTypicalDelta * expf(-r.rows.entropy(p));
    const float bar = likely < kTypicalEpsilon ? likely : kTypicalEpsilon;
    for (int child = tree.first(node); child >= 0; child = tree.next(child)) {
      if (!(r.rows.target(p, tree.tokens[child]) > bar) && !r.lossy.judged(child)) continue;
      r.rows.set_mark(child, here + 1);
      if (here + 1 > length || (here + 1 == length && child < end)) {
        end = child;
        length = here + 1;
      }
    }
  }
  if (!r.rows.open(end, false, &p, &q)) return 0;
  const int32_t last = r.rows.draw(p, own_point(), Weight{}, r.coins.last());
  r.rows.emit(length - 1, end, last, r.rows.wants_logprobs() ? r.rows.logprob(p, last) : 0.0f);
  for (int node = end, depth = length - 2; depth >= 0; --depth) {
    const int32_t token = tree.tokens[node];
    node = tree.parent(node);
    if (r.rows.wants_logprobs() && !r.rows.open(node, false, &p, &q)) return 0;
    r.rows.emit(depth, node, token, r.rows.wants_logprobs() ? r.rows.logprob(p, token) : 0.0f);
  }
  return length;
}

}  // namespace specdec
