// An online suffix automaton over one token sequence, for drafts that copy what the sequence said before.
#pragma once

#include <cstdint>
#include <vector>

namespace specdec {

// The longest suffix of the text that also ends earlier: its length, and where its first occurrence ends (the index
// of the token that followed it there).
struct Match {
  int32_t length = 0;
  int32_t next = 0;
};

// A trie of continuations. Node 0 is the last token of the text; parents come before children.
struct Trie {
  std::vector<int32_t> tokens, parents, frequencies;
};

// Suffix automaton (Blumer et al. 1985) that keeps, beside its transitions, the tree of suffix links downwards. The
// state of a suffix knows all its earlier occurrences as the non-cloned states below it.
class SuffixIndex {
 public:
  SuffixIndex();

  // Appends tokens (>= 0); amortised O(1) each. Throws std::length_error past kMaxTokens, before any change.
  void extend(const int32_t* tokens, int64_t count);

  int64_t size() const { return static_cast<int64_t>(text_.size()); }
  int64_t bytes() const;
  Match longest_match() const;

  // At most k tokens: at each step the most frequent continuation of the longest match among the occurrences that
  // agree so far, the most recent on equal counts. Occurrences that reach the end of the text go on in the draft.
  std::vector<int32_t> propose_chain(int64_t k, int32_t min_match, int64_t max_occurrences) const;

  // See host.py for the order in which nodes are taken.
  Trie propose_tree(int64_t max_nodes, int64_t branches, int64_t max_depth, int32_t min_match,
                    int64_t max_occurrences) const;

  static constexpr int64_t kMaxTokens = int64_t{1} << 28;

 private:
  struct State {
    int32_t length;   // of the longest string of this state
    int32_t link;     // state of its longest proper suffix that is another state
    int32_t end;      // index of the token behind its first occurrence; ~index for clones, which end nowhere
    int32_t edges;    // head of the list of transitions
    int32_t child;    // suffix links downwards: head of the list, newest first
    int32_t sibling;  // next in that list
    int32_t before;   // previous in that list, -1 at its head
  };
  struct Edge {
    int32_t state, token, target, next;
  };

  int32_t add_state(int32_t length, int32_t end);
  void append(int32_t token);
  int32_t clone(int32_t state, int32_t length);
  void link(int32_t state, int32_t above);
  void unlink(int32_t state);

  int64_t slot(int32_t state, int32_t token) const;
  int32_t find(int32_t state, int32_t token) const;
  void add_edge(int32_t state, int32_t token, int32_t target);
  void grow_table();

  // Appends the ends of the earlier occurrences of `state`'s strings, without those below `done`, until `ends` holds
  // `limit` of them.
  void collect(int32_t state, int32_t done, int64_t limit, std::vector<int32_t>* ends) const;

  std::vector<int32_t> text_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> table_;  // open addressing over (state, token): index of an edge, -1 = free
  int32_t last_ = 0;
};

}  // namespace specdec
