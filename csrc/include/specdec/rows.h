#pragma once

#include <stdint.h>

#include "macros.h"
#include "numerics.h"

// What a verifier needs to know of rows as wide as the vocabulary. The walks of walkers.h and traversal.h are scalar
// programs over a `Rows`, written once per backend. On a device every thread of a team runs the walk, and each call is
// collective: all threads pass the same arguments and get the same answer.
//
//   bool open(int node, bool drafted, Row* p, Row* q)
//        Reads row `node` of the target and, if `drafted`, that of the draft: lse and filter threshold. Drafts without
//        logits give q = own_point(); if not `drafted`, q stays as it is. False if a row that was read holds NaN, +inf
//        or nothing finite.
//   float target(const Row& p, int32_t token), float draft(const Row& q, int32_t token)
//        Probabilities; exclusion does not touch them.
//   float logprob(const Row& p, int32_t token)
//   float entropy(const Row& p)                       in nats
//   int32_t top(int node)                             the target's argmax, lowest id among equals; -1: a broken row
//   double mass(const Row& p, const Row& q, Weight w) sum over all tokens of p - min(w.c q, w.d p), 0 if excluded
//   int32_t draw(const Row& p, const Row& q, Weight w, float u)
//        Inverse CDF of these weights in vocabulary order; of p itself where they have no mass.
//   Overlap overlap(const Row& p, const Row& q, double rho)
//   bool renormalise(Row* q, double* share)
//        Peak and total of q without the excluded tokens, and their share of the total before; false if nothing is left
//   void exclude(int32_t token), bool excluded(int32_t token), void forget()
//        One set of tokens, empty after open().
//   int mark(int node), void set_mark(int node, int)  a number for each node of the request
//   void save(int depth, const Frame&), Frame load(int depth)  for depth 0 .. max_depth
//   bool wants_logprobs(), void emit(int depth, int node, int32_t token, float logprob)

namespace specdec {

/// A row of logits as a distribution, exp((x - peak) / T) / total over what filters leave; T is the request's.
struct Row {
  int32_t node;   // -1: see own_point()
  int32_t point;  // temperature 0: the token that has all the mass; else -1
  float peak;     // largest logit of what is left
  float cut;      // smaller logits are filtered out
  double total;
};

/// A draft without a distribution: whatever token is asked for had all the mass.
SPECDEC_HD Row own_point() { return {-1, -1, 0.0f, 0.0f, 1.0}; }

/// The weights p - min(c q, d p). Every exact residual has this form: d is 1 but for K-SEQ, and then it is (p - c q)+.
struct Weight {
  float c = 0.0f;
  float d = 1.0f;

  SPECDEC_HD float of(float p, float q) const {
    const float taken = rounded_product(c, q), most = rounded_product(d, p);
    return rounded_difference(p, taken < most ? taken : most);
  }
};

/// sum of min(q, p / rho), and the part of it where p / rho is the smaller.
struct Overlap {
  double both;
  double capped;
};

/// A node on the path from the root to where traversal verification is; see traversal.h.
struct Frame {
  Row p, q;
  double c = 0.0, m = 1.0, kept = 1.0;  // see Residual
  float weight = 1.0f;
  int32_t node = 0, child = -1;
};

/// c as kernels take it: finite, so that c * 0 is 0.
SPECDEC_HD float finite(double c) { return c < 1e30 ? static_cast<float>(c) : 1e30f; }

/// The probability with which a token was drafted, among draws of which the excluded are gone.
template <class Rows>
SPECDEC_HD float drafted(Rows& rows, const Row& q, int32_t token) {
  if (q.node < 0) return 1.0f;
  return rows.excluded(token) ? 0.0f : rows.draft(q, token);
}

/// What is left of p at a node after rejections: (p - c q)+ / m outside the excluded tokens.
struct Residual {
  double c = 0.0;
  double m = 1.0;
  double kept = 1.0;  // share of q's total that is left since it was last summed

  SPECDEC_HD Weight weight() const { return {finite(c), 1.0f}; }

  template <class Rows>
  SPECDEC_HD float at(Rows& rows, const Row& p, float q, int32_t token) const {
    if (rows.excluded(token)) return 0.0f;
    return weight().of(rows.target(p, token), q) / static_cast<float>(m);
  }

  /// A draft of q, with path weight w, was rejected. Returns the share of the mass that is left: 0 where none is, which
  /// has probability 0 but which rounding may reach; then p stands in.
  template <class Rows>
  SPECDEC_HD double reject(Rows& rows, const Row& p, const Row& q, int32_t token, double w) {
    if (q.node < 0)
      rows.exclude(token);
    else
      c += m / w;
    const double before = m;
    m = rows.mass(p, q, weight());
    if (m > 0.0) return m / before;
    *this = Residual{};
    rows.forget();
    return 0.0;
  }

  /// Drafts without replacement: q loses a token. Its total is summed again before differences could lose their digits.
  template <class Rows>
  SPECDEC_HD void remove(Rows& rows, Row& q, int32_t token) {
    const float chance = q.node < 0 ? 0.0f : drafted(rows, q, token);
    if (!(chance > 0.0f)) return;
    rows.exclude(token);
    if (q.point >= 0) return exhaust(q);
    const double share = 1.0 - chance;
    kept *= share;
    if (kept > 0.25) {
      q.total *= share;
      c *= share;
      return;
    }
    double left;
    if (!rows.renormalise(&q, &left)) return exhaust(q);
    c *= left;
    kept = 1.0;
  }

 private:
  // All that q could draw is excluded, so c has nothing left to weigh.
  SPECDEC_HD void exhaust(Row& q) {
    q = own_point();
    c = 0.0;
  }
};

}  // namespace specdec
