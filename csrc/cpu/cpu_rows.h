// What one worker holds to walk requests: the `Rows` of specdec/rows.h on a CPU. All of it is as large as a tree, or as
// the blocks of a row, never as a vocabulary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "specdec/traversal.h"
#include "verify_rows.h"

namespace specdec {

class CpuRows {
 public:
  CpuRows(const LogitRows& target, const LogitRows& draft, Team team)
      : kernels_(kernels()),
        team_(team),
        cut_of_(*kernels_.select, team),
        p_(target, kernels_, cut_of_),
        q_(draft, kernels_, cut_of_) {}

  // Before each request. `path` and `logprobs` (may be null) take what is emitted, by depth.
  void start(int64_t first, int nodes, const Filters& target, const Filters& draft, int32_t* tokens, int32_t* path,
             float* logprobs) {
    p_.start(first, target);
    q_.start(first, draft);
    marks_.resize(nodes);
    tokens_ = tokens;
    nodes_ = path;
    logprobs_ = logprobs;
  }

  void link(Tree* tree) {
    first_child_.resize(tree->nodes);
    next_sibling_.resize(tree->nodes);
    link_children(*tree, first_child_.data(), next_sibling_.data());
    tree->first_child = first_child_.data();
    tree->next_sibling = next_sibling_.data();
  }

  bool open(int node, bool drafted, Row* p, Row* q) {
    forget();
    const bool reads_draft = drafted && q_.given();
    const LogitRow target = p_.logits(unread(node));
    const LogitRow draft = reads_draft ? q_.logits(unread(node)) : LogitRow{};
    const int64_t split = p_.blocks();
    p_.expect_blocks();
    if (reads_draft) q_.expect_blocks();
    team_(split + (reads_draft ? q_.blocks() : 0),
          [&](int64_t i) { i < split ? p_.read(target, i) : q_.read(draft, i - split); });
    *p = p_.settle(node, target, team_);
    if (drafted) *q = reads_draft ? q_.settle(node, draft, team_) : own_point();
    if (p_.sampled()) p_.masses(*p, &opened_masses_);
    opened_ = node;
    return p->node >= 0 && (!reads_draft || q->node >= 0);
  }

  int32_t top(int node) {
    const LogitRow target = p_.logits(unread(node));
    p_.expect_blocks();
    team_(p_.blocks(), [&](int64_t i) { p_.read(target, i); });
    const Row row = p_.settle(node, target, team_);
    return row.node >= 0 ? row.point : -1;
  }

  float target(const Row& p, int32_t token) const { return p_.probability(p, token); }
  float draft(const Row& q, int32_t token) const { return q_.probability(q, token); }
  float logprob(const Row& p, int32_t token) const { return p_.logprob(p, token); }

  float entropy(const Row& p) {
    if (p.point >= 0) return 0.0f;
    const LogitRow row = p_.logits(p);
    const Softmax softmax = p_.softmax(p, 1.0);
    summed_ = {};
    const double sum = sum_blocks([&](int64_t i) { return kernels_.verify->log_sum(row, softmax, i); });
    return static_cast<float>(std::log(p.total) - sum / p.total * 0.6931471805599453);
  }

  double mass(const Row& p, const Row& q, Weight w) {
    if (p.point >= 0) return excluded(p.point) ? 0.0 : w.of(1.0f, weighs(q, w) ? draft(q, p.point) : 0.0f);
    const Sum wanted = {p.node, weighs(q, w) ? q.node : -1, w.c, w.d, q.total};
    if (summed_ == wanted) return total();
    summed_ = wanted;
    const LogitRow target = without(p_.logits(p), excluded_);
    const Softmax P = p_.softmax(p, 1.0);
    auto excess = [&](const LogitRow* drafts, const Softmax& Q, int64_t block) {
      return kernels_.verify->excess(target, P, drafts, Q, w.d, block);
    };
    if (weighs(q, w) && q.point < 0) {
      const LogitRow drafts = without(q_.logits(q), excluded_columns_);
      const Softmax Q = q_.softmax(q, w.c);
      return sum_blocks([&](int64_t i) { return excess(&drafts, Q, i); });
    }
    if (opened_ == p.node)
      block_masses_ = opened_masses_;
    else
      sum_blocks([&](int64_t i) { return excess(nullptr, P, i); });
    // Only blocks that hold an excluded token or the draft's point mass differ from p's.
    const LogitRow point = point_row(q);
    const LogitRow* drafts = weighs(q, w) ? &point : nullptr;
    auto again = [&](int32_t token) {
      block_masses_[token / kBlock] = excess(drafts, {kPointLogit, 1.0f, w.c}, token / kBlock);
    };
    int64_t done = -1;
    for (int32_t token : excluded_) {
      if (token / kBlock != done) again(token);
      done = token / kBlock;
    }
    if (drafts && q.point < target.columns) again(q.point);
    return total();
  }

  int32_t draw(const Row& p, const Row& q, Weight w, float u) {
    if (p.point >= 0) return p.point;
    double whole = mass(p, q, w);
    if (!(whole > 0.0)) {
      forget();
      w = Weight{};
      whole = mass(p, q, w);
    }
    const double wanted = u * whole;
    int64_t chosen = 0;
    double before = 0.0, inside = 0.0;
    for (size_t i = 0; i < block_masses_.size(); ++i) {
      if (block_masses_[i] > 0.0) {
        chosen = static_cast<int64_t>(i);
        inside = wanted - before;
      }
      before += block_masses_[i];
      if (before > wanted) break;
    }
    const LogitRow target = without(p_.logits(p), excluded_);
    const bool softmax = weighs(q, w) && q.point < 0;
    const LogitRow drafts = softmax ? without(q_.logits(q), excluded_columns_) : point_row(q);
    const Softmax Q = softmax ? q_.softmax(q, w.c) : Softmax{kPointLogit, 1.0f, w.c};
    return static_cast<int32_t>(
        kernels_.verify->draw(target, p_.softmax(p, 1.0), weighs(q, w) ? &drafts : nullptr, Q, w.d, chosen, inside));
  }

  Overlap overlap(const Row& p, const Row& q, double rho) {
    if (p.point >= 0 || q.point >= 0) {
      const int32_t token = p.point >= 0 ? p.point : q.point;
      const double a = target(p, token) / rho, b = draft(q, token);
      return {std::min(a, b), a < b ? a : 0.0};
    }
    const LogitRow target = p_.logits(p), drafts = q_.logits(q);
    const Softmax P = p_.softmax(p, 1.0 / rho), Q = q_.softmax(q, 1.0);
    shares_.resize(p_.blocks());
    team_(p_.blocks(), [&](int64_t i) { shares_[i] = kernels_.verify->overlap(target, P, drafts, Q, i); });
    Overlap sum = {0.0, 0.0};
    for (const Shares& block : shares_) {
      sum.both += block.both;
      sum.capped += block.capped;
    }
    return sum;
  }

  bool renormalise(Row* q, double* share) {
    const Row before = *q;
    if (!q_.resum(q, excluded_columns_, team_)) return false;
    *share = q->total / before.total * std::exp2((static_cast<double>(q->peak) - before.peak) * q_.slope());
    return true;
  }

  void exclude(int32_t token) {
    if (!insert(&excluded_, token)) return;
    summed_ = {};
    if (!q_.given()) return;
    const int64_t column = q_.rows().column_of(token);
    if (column >= 0) insert(&excluded_columns_, static_cast<int32_t>(column));
  }
  bool excluded(int32_t token) const {
    return !excluded_.empty() && std::binary_search(excluded_.begin(), excluded_.end(), token);
  }
  void forget() {
    summed_ = {};
    excluded_.clear();
    excluded_columns_.clear();
  }

  int mark(int node) const { return marks_[node]; }
  void set_mark(int node, int value) { marks_[node] = value; }

  void save(int depth, const Frame& frame) {
    if (static_cast<size_t>(depth) >= frames_.size()) frames_.resize(depth + 1);
    frames_[depth] = frame;
  }
  const Frame& load(int depth) const { return frames_[depth]; }

  bool wants_logprobs() const { return logprobs_ != nullptr; }
  void emit(int depth, int node, int32_t token, float logprob) {
    tokens_[depth] = token;
    nodes_[depth] = node;
    if (logprobs_) logprobs_[depth] = logprob;
  }

 private:
  static constexpr float kPointLogit = 0.0f;

  static Row unread(int node) { return {node, -1, 0.0f, -std::numeric_limits<float>::infinity(), 1.0}; }
  static bool weighs(const Row& q, Weight w) { return w.c > 0.0f && q.node >= 0; }

  static LogitRow without(LogitRow row, const std::vector<int32_t>& columns) {
    row.excluded = columns.data();
    row.num_excluded = static_cast<int64_t>(columns.size());
    return row;
  }

  // A point mass as a row of one column.
  static LogitRow point_row(const Row& q) {
    return {&kPointLogit, &q.point, nullptr, 1, std::numeric_limits<int32_t>::max(), DType::kFloat};
  }

  static bool insert(std::vector<int32_t>* ascending, int32_t value) {
    const auto at = std::lower_bound(ascending->begin(), ascending->end(), value);
    if (at != ascending->end() && *at == value) return false;
    ascending->insert(at, value);
    return true;
  }

  // Of what block_masses_ are; excluded tokens apart, which reset it.
  struct Sum {
    int p = -1, q = -1;
    float c = 0.0f, d = 0.0f;
    double q_total = 0.0;

    bool operator==(const Sum& o) const { return p == o.p && q == o.q && c == o.c && d == o.d && q_total == o.q_total; }
  };

  template <class F>
  double sum_blocks(const F& block_sum) {
    block_masses_.resize(p_.blocks());
    team_(p_.blocks(), [&](int64_t i) { block_masses_[i] = block_sum(i); });
    return total();
  }
  double total() const {
    double sum = 0.0;
    for (double block : block_masses_) sum += block;
    return sum;
  }

  const Kernels& kernels_;
  const Team team_;
  CutFinder<Team> cut_of_;
  Side p_, q_;
  Sum summed_;
  int opened_ = -1;  // node of the target's row of which opened_masses_ are
  std::vector<double> opened_masses_, block_masses_;
  std::vector<Shares> shares_;
  std::vector<int32_t> excluded_, excluded_columns_;  // tokens, and the draft's columns of them; ascending
  std::vector<int32_t> marks_, first_child_, next_sibling_;
  std::vector<Frame> frames_;
  int32_t* tokens_ = nullptr;
  int32_t* nodes_ = nullptr;
  float* logprobs_ = nullptr;
};

}  // namespace specdec
