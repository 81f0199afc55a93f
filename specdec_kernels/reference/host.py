"""The suffix index in plain Python: brute force over all earlier positions."""

from __future__ import annotations

from collections import Counter


class SuffixIndex:
    """See specdec_kernels.host.SuffixIndex. Every call reads the whole text."""

    def __init__(self):
        self.text: list[int] = []

    def __len__(self) -> int:
        return len(self.text)

    def nbytes(self) -> int:
        """Bytes of the list alone."""
        return 8 * len(self.text)

    def extend(self, tokens) -> None:
        """Append an int32 buffer."""
        self.text.extend(memoryview(tokens).cast("B").cast("i") if len(tokens) else ())

    def longest_match(self) -> tuple[int, int]:
        """(length, index behind the first occurrence) of the longest suffix that also ends earlier."""
        lengths = self._lengths()
        longest = max(lengths.values(), default=0)
        return (longest, min(end for end, n in lengths.items() if n == longest)) if longest else (0, 0)

    def _lengths(self) -> dict[int, int]:
        """For each earlier end: how many tokens before it agree with the end of the text."""
        text, size = self.text, len(self.text)
        lengths = {}
        for end in range(size - 1, 0, -1):
            n = 0
            while n < end and text[end - 1 - n] == text[size - 1 - n]:
                n += 1
            if n:
                lengths[end] = n
        return lengths

    def propose_chain(self, k: int, min_match: int, max_occurrences: int) -> list[int]:
        """The most frequent continuation of the longest match, token by token."""
        lengths = self._lengths()
        longest = max(lengths.values(), default=0)
        draft: list[int] = []
        ends = [end for end, n in lengths.items() if n == longest][:max_occurrences]  # most recent first
        if longest < min_match or not ends:
            return draft
        size = len(self.text)
        for step in range(k):
            following = [self.text[at] if at < size else draft[at - size] for at in (end + step for end in ends)]
            # Equal counts: Counter keeps the order in which tokens came, which is that of the ends.
            token = Counter(following).most_common(1)[0][0]
            draft.append(token)
            ends = [end for end, other in zip(ends, following, strict=True) if other == token]
        return draft

    def propose_tree(self, max_nodes: int, branches: int, max_depth: int, min_match: int, max_occurrences: int):
        """Tokens, parents and frequencies of the trie."""
        if not self.text:
            return [], [], []
        lengths = self._lengths()
        counts: Counter[tuple[int, ...]] = Counter()
        latest: dict[tuple[int, ...], int] = {}
        taken: dict[tuple[int, ...], int] = {(): 0}
        left = max_occurrences
        for length in sorted(set(lengths.values()), reverse=True):
            if length < min_match or left <= 0 or len(taken) >= max_nodes:
                break
            ends = [end for end, n in lengths.items() if n == length][:left]
            left -= len(ends)
            for end in ends:
                continuation = tuple(self.text[end : end + max_depth])
                for depth in range(len(continuation) + 1):
                    path = continuation[:depth]
                    counts[path] += 1
                    latest[path] = max(latest.get(path, 0), end)
            while len(taken) < max_nodes:
                siblings = Counter(path[:-1] for path in taken if path)
                open_paths = [
                    path
                    for path in counts
                    if path and path not in taken and path[:-1] in taken and siblings[path[:-1]] < branches
                ]
                if not open_paths:
                    break
                taken[max(open_paths, key=lambda path: (counts[path], -len(path), latest[path]))] = len(taken)
        tokens = [path[-1] if path else self.text[-1] for path in taken]
        parents = [taken[path[:-1]] if path else -1 for path in taken]
        return tokens, parents, [counts[path] for path in taken]
