#include "ngram.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <utility>

namespace specdec {
namespace {

constexpr int32_t kNone = -1;

uint64_t mix(int32_t state, int32_t token) {
  uint64_t key = (static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32) | static_cast<uint32_t>(token);
  key ^= key >> 32;
  key *= 0x9E3779B97F4A7C15ull;
  return key ^ (key >> 29);
}

}  // namespace

SuffixIndex::SuffixIndex() : table_(64, kNone) { add_state(0, ~0); }

int64_t SuffixIndex::bytes() const {
  return static_cast<int64_t>(text_.capacity() * sizeof(int32_t) + states_.capacity() * sizeof(State) +
                              edges_.capacity() * sizeof(Edge) + table_.capacity() * sizeof(int32_t));
}

int32_t SuffixIndex::add_state(int32_t length, int32_t end) {
  states_.push_back({length, kNone, end, kNone, kNone, kNone, kNone});
  return static_cast<int32_t>(states_.size()) - 1;
}

void SuffixIndex::link(int32_t state, int32_t above) {
  State& s = states_[state];
  s.link = above;
  s.before = kNone;
  s.sibling = states_[above].child;
  if (s.sibling != kNone) states_[s.sibling].before = state;
  states_[above].child = state;
}

void SuffixIndex::unlink(int32_t state) {
  const State& s = states_[state];
  if (s.before != kNone) {
    states_[s.before].sibling = s.sibling;
  } else {
    states_[s.link].child = s.sibling;
  }
  if (s.sibling != kNone) states_[s.sibling].before = s.before;
}

int64_t SuffixIndex::slot(int32_t state, int32_t token) const {
  const uint64_t mask = table_.size() - 1;
  uint64_t at = mix(state, token) & mask;
  while (table_[at] != kNone && (edges_[table_[at]].state != state || edges_[table_[at]].token != token)) {
    at = (at + 1) & mask;
  }
  return static_cast<int64_t>(at);
}

int32_t SuffixIndex::find(int32_t state, int32_t token) const { return table_[slot(state, token)]; }

void SuffixIndex::add_edge(int32_t state, int32_t token, int32_t target) {
  // At most two thirds full.
  if ((edges_.size() + 1) * 3 > table_.size() * 2) grow_table();
  table_[slot(state, token)] = static_cast<int32_t>(edges_.size());
  edges_.push_back({state, token, target, states_[state].edges});
  states_[state].edges = static_cast<int32_t>(edges_.size()) - 1;
}

void SuffixIndex::grow_table() {
  table_.assign(table_.size() * 2, kNone);
  for (size_t i = 0; i < edges_.size(); ++i) table_[slot(edges_[i].state, edges_[i].token)] = static_cast<int32_t>(i);
}

int32_t SuffixIndex::clone(int32_t state, int32_t length) {
  const int32_t end = states_[state].end;
  const int32_t copy = add_state(length, end < 0 ? end : ~end);
  for (int32_t e = states_[state].edges; e != kNone; e = edges_[e].next) {
    add_edge(copy, edges_[e].token, edges_[e].target);
  }
  link(copy, states_[state].link);
  unlink(state);
  link(state, copy);
  return copy;
}

void SuffixIndex::append(int32_t token) {
  text_.push_back(token);
  const auto length = static_cast<int32_t>(text_.size());
  const int32_t fresh = add_state(length, length);
  int32_t p = last_;
  int32_t e = kNone;
  for (; p != kNone; p = states_[p].link) {
    e = find(p, token);
    if (e != kNone) break;
    add_edge(p, token, fresh);
  }
  last_ = fresh;
  if (p == kNone) {
    link(fresh, 0);
    return;
  }
  const int32_t q = edges_[e].target;
  if (states_[q].length == states_[p].length + 1) {
    link(fresh, q);
    return;
  }
  const int32_t copy = clone(q, states_[p].length + 1);
  for (; p != kNone; p = states_[p].link) {
    e = find(p, token);
    if (e == kNone || edges_[e].target != q) break;
    edges_[e].target = copy;
  }
  link(fresh, copy);
}

void SuffixIndex::extend(const int32_t* tokens, int64_t count) {
  if (count > kMaxTokens - size()) throw std::length_error("more tokens than an index holds");
  for (int64_t i = 0; i < count; ++i) append(tokens[i]);
}

Match SuffixIndex::longest_match() const {
  if (last_ == 0) return {};
  const State& state = states_[states_[last_].link];
  if (state.length == 0) return {};
  return {state.length, state.end < 0 ? ~state.end : state.end};
}

void SuffixIndex::collect(int32_t state, int32_t done, int64_t limit, std::vector<int32_t>* ends) const {
  // Every state without an end of its own has two children at least, so few more states are visited than ends found.
  std::vector<int32_t> stack{state};
  while (!stack.empty() && static_cast<int64_t>(ends->size()) < limit) {
    const int32_t s = stack.back();
    stack.pop_back();
    if (s != state && states_[s].sibling != kNone) stack.push_back(states_[s].sibling);
    if (s == done) continue;
    if (states_[s].end >= 0 && s != last_) ends->push_back(states_[s].end);
    if (states_[s].child != kNone) stack.push_back(states_[s].child);
  }
}

std::vector<int32_t> SuffixIndex::propose_chain(int64_t k, int32_t min_match, int64_t max_occurrences) const {
  std::vector<int32_t> draft;
  if (longest_match().length < min_match || longest_match().length == 0) return draft;
  std::vector<int32_t> ends;
  collect(states_[last_].link, last_, max_occurrences, &ends);
  // Most recent first, which a stable count then keeps.
  std::sort(ends.begin(), ends.end(), [](int32_t a, int32_t b) { return a > b; });
  const auto n = static_cast<int64_t>(text_.size());
  draft.reserve(static_cast<size_t>(k));
  std::vector<std::pair<int32_t, int32_t>> next;  // (token, place in `ends`)
  for (int64_t step = 0; step < k; ++step) {
    next.clear();
    for (size_t i = 0; i < ends.size(); ++i) {
      const int64_t at = ends[i] + step;
      next.emplace_back(at < n ? text_[at] : draft[at - n], static_cast<int32_t>(i));
    }
    std::sort(next.begin(), next.end());
    size_t best = 0, best_count = 0;
    for (size_t i = 0, j; i < next.size(); i = j) {
      for (j = i; j < next.size() && next[j].first == next[i].first; ++j) continue;
      const bool newer = j - i == best_count && next[i].second < next[best].second;
      if (j - i > best_count || newer) best = i, best_count = j - i;
    }
    draft.push_back(next[best].first);
    std::vector<int32_t> agreeing;
    for (size_t i = best; i < best + best_count; ++i) agreeing.push_back(ends[next[i].second]);
    ends = std::move(agreeing);
  }
  return draft;
}

Trie SuffixIndex::propose_tree(int64_t max_nodes, int64_t branches, int64_t max_depth, int32_t min_match,
                               int64_t max_occurrences) const {
  Trie trie;
  if (text_.empty()) return trie;
  // All continuations met so far; the trie that is returned is the part of it that was taken.
  struct Node {
    int32_t token, parent, depth, child, sibling, count, latest, place, taken_children;
  };
  std::vector<Node> all{{text_.back(), kNone, 0, kNone, kNone, 0, 0, 0, 0}};
  std::vector<int32_t> taken{0};
  std::vector<int32_t> ends;
  const auto n = static_cast<int64_t>(text_.size());

  const auto insert = [&](int32_t end) {
    int32_t node = 0;
    ++all[0].count;
    for (int64_t at = end; at < n && at - end < max_depth; ++at) {
      int32_t child = all[node].child;
      while (child != kNone && all[child].token != text_[at]) child = all[child].sibling;
      if (child == kNone) {
        child = static_cast<int32_t>(all.size());
        all.push_back({text_[at], node, all[node].depth + 1, kNone, all[node].child, 0, 0, kNone, 0});
        all[node].child = child;
      }
      ++all[child].count;
      all[child].latest = std::max(all[child].latest, end);
      node = child;
    }
  };
  const auto worse = [&](int32_t a, int32_t b) {
    if (all[a].count != all[b].count) return all[a].count < all[b].count;
    if (all[a].depth != all[b].depth) return all[a].depth > all[b].depth;
    return all[a].latest < all[b].latest;
  };
  const auto take = [&] {
    std::priority_queue<int32_t, std::vector<int32_t>, decltype(worse)> open(worse);
    const auto offer_children = [&](int32_t node) {
      for (int32_t c = all[node].child; c != kNone; c = all[c].sibling) {
        if (all[c].place == kNone) open.push(c);
      }
    };
    for (const int32_t node : taken) offer_children(node);
    while (!open.empty() && static_cast<int64_t>(taken.size()) < max_nodes) {
      const int32_t node = open.top();
      open.pop();
      Node& parent = all[all[node].parent];
      if (parent.taken_children == branches) continue;
      ++parent.taken_children;
      all[node].place = static_cast<int32_t>(taken.size());
      taken.push_back(node);
      offer_children(node);
    }
  };

  int32_t done = last_;
  for (int32_t s = states_[last_].link; s > 0; done = s, s = states_[s].link) {
    const auto seen = ends.size();
    if (states_[s].length < min_match || static_cast<int64_t>(taken.size()) >= max_nodes) break;
    if (static_cast<int64_t>(seen) >= max_occurrences) break;
    collect(s, done, max_occurrences, &ends);
    for (size_t i = seen; i < ends.size(); ++i) insert(ends[i]);
    take();
  }
  for (const int32_t node : taken) {
    trie.tokens.push_back(all[node].token);
    trie.parents.push_back(node == 0 ? kNone : all[all[node].parent].place);
    trie.frequencies.push_back(all[node].count);
  }
  return trie;
}

}  // namespace specdec
