#pragma once

#include "rows.h"
#include "tree.h"
#include "walkers.h"

// Traversal verification (arXiv 2505.12398): leaves first, each rejection hands its share back to the parent. On a
// chain it is block verification (Sun et al., 2403.10444).
//
// Leaves come in depth-first order, so one frame for each node between the root and where the walk is holds all state:
// a node's weight is fixed when the walk enters it and changes only when a child of it is rejected.

namespace specdec {

/// The share of a node's probability that its draft can claim. A token that q never draws claims all that p can give.
SPECDEC_HD float claim(float w, float p, float q) {
  const float ratio = q > 0.0f ? p / q : p > 0.0f ? 1e38f : 0.0f;
  const float claimed = rounded_product(w, ratio);
  return claimed < 1.0f ? claimed : 1.0f;
}

/// S / (S + 1 - w), what remains of a node's weight when all below it was rejected; 0/0 has probability 0.
SPECDEC_HD float hold(double surplus, float w) {
  const double whole = surplus + 1.0 - w;
  return whole > 0.0 ? static_cast<float>(surplus / whole) : 0.0f;
}

template <class Rows>
class Traversal {
 public:
  SPECDEC_HD Traversal(const Request<Rows>& request, bool replacement) : r_(request), replacement_(replacement) {}

  /// Returns the number of tokens emitted, 0 if a row that was read is broken.
  SPECDEC_HD int walk() {
    if (!enter(0, 1.0f, r_.tree.first(0) >= 0 && r_.tree.max_depth > 0)) return 0;
    for (;;) {
      if (f_.child < 0) {
        // Everything below was rejected. The root is always accepted.
        if (depth_ == 0 || r_.coins.accept(f_.node) < f_.weight) return finish();
        const int rejected = f_.node;
        f_ = r_.rows.load(--depth_);
        exclude_tried();
        reject(rejected);
        continue;
      }
      const int child = f_.child;
      const int32_t token = r_.tree.tokens[child];
      const float chance = drafted(r_.rows, f_.q, token);
      const float weight = claim(f_.weight, residual().at(r_.rows, f_.p, chance, token), chance);
      const bool inner = depth_ + 1 < r_.tree.max_depth && r_.tree.first(child) >= 0;
      // A subtree without weight is rejected leaf by leaf, whatever the coins; nothing of it needs to be read.
      if (weight > 0.0f && (inner || r_.coins.accept(child) < weight)) {
        r_.rows.save(depth_++, f_);
        if (!enter(child, weight, inner)) return 0;
        if (!inner) return finish();
      } else {
        reject(child);
      }
    }
  }

 private:
  SPECDEC_HD bool enter(int node, float weight, bool inner) {
    f_ = Frame{};
    f_.q = own_point();
    f_.weight = weight;
    f_.node = node;
    if (inner) f_.child = r_.tree.first(node);
    return r_.rows.open(node, inner, &f_.p, &f_.q);
  }

  SPECDEC_HD Residual residual() const { return {f_.c, f_.m, f_.kept}; }

  /// The node where the walk is loses a child.
  SPECDEC_HD void reject(int child) {
    const int32_t token = r_.tree.tokens[child];
    Residual left = residual();
    const double share = left.reject(r_.rows, f_.p, f_.q, token, f_.weight);
    const float weight = depth_ == 0 ? 1.0f : hold(share * f_.weight, f_.weight);
    f_.child = weight > 0.0f ? r_.tree.next(child) : -1;
    if (!replacement_ && share > 0.0 && f_.child >= 0) left.remove(r_.rows, f_.q, token);
    f_.weight = weight;
    f_.c = left.c;
    f_.m = left.m;
    f_.kept = left.kept;
  }

  /// The list of excluded tokens is that of one node: back at a node, those of its children that were rejected.
  SPECDEC_HD void exclude_tried() {
    r_.rows.forget();
    if (replacement_ && f_.q.node >= 0) return;
    for (int child = r_.tree.first(f_.node); child != f_.child; child = r_.tree.next(child))
      r_.rows.exclude(r_.tree.tokens[child]);
  }

  SPECDEC_HD int finish() {
    const int32_t last = r_.rows.draw(f_.p, f_.q, residual().weight(), r_.coins.last());
    int32_t token = last;
    for (int depth = depth_;; f_ = r_.rows.load(--depth)) {
      r_.rows.emit(depth, f_.node, token, r_.rows.wants_logprobs() ? r_.rows.logprob(f_.p, token) : 0.0f);
      if (depth == 0) return depth_ + 1;
      token = r_.tree.tokens[f_.node];
    }
  }

  const Request<Rows>& r_;
  const bool replacement_;
  int depth_ = 0;
  Frame f_{};
};

/// Any method but `greedy` on its own: see specdec_kernels.verify_tree.
template <class Rows>
SPECDEC_HD int walk(Method method, const Request<Rows>& r) {
  if (r.lossy.synthetic) return walk_synthetic(r);
  switch (method) {
    case Method::kGreedy:
      return walk_greedy(r);
    case Method::kTargetOnly:
      return walk_down<TargetOnly>(r);
    case Method::kMultiRound:
      return walk_down<MultiRound<true>>(r);
    case Method::kWithoutReplacement:
      return walk_down<MultiRound<false>>(r);
    case Method::kKSeq:
      return walk_down<KSeq>(r);
    case Method::kGreedyMulti:
      return walk_down<GreedyMulti>(r);
    case Method::kTypical:
      return walk_typical(r);
    case Method::kTraversal:
      return Traversal<Rows>(r, false).walk();
    case Method::kTraversalIid:
      return Traversal<Rows>(r, true).walk();
  }
  return 0;
}

}  // namespace specdec
