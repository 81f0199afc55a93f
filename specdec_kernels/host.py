"""Structures that live on the host and keep state between calls: the suffix index behind retrieval drafts."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from . import backends
from .backends import BackendError
from .checks import check_choice, check_int
from .reference import host as reference
from .types import DraftTree

_MISSING = backends._load("_host")
_MAX_DEPTH = 8
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class SuffixIndex:
    """What one request has said so far, indexed for drafts that continue it as it continued before.

    Prompt lookup and SAM decoding (arXiv 2411.10666): the end of the text is looked up in the text itself, and what
    followed it there is proposed. The native index is an online suffix automaton: appending costs amortised O(1) a
    token, the longest match costs O(1) at any length of the text, and a proposal looks at `max_occurrences` places. It
    takes 100 to 200 bytes a token (see `nbytes`), 300 at worst. Append committed tokens only: nothing can be taken
    back. Calls release the interpreter's lock and may come from any thread.

    Tokens go in as a sequence of ints, a CPU integer tensor, or anything with the buffer protocol (a numpy array);
    int32 is read in place. Tensors that come out are int32 on the CPU.
    """

    def __init__(self, tokens: Sequence[int] | Tensor = (), *, backend: str | None = None):
        """Index `tokens`.

        Args:
            tokens: the prompt.
            backend: `cpu` (compiled) or `reference` (plain Python, reads the whole text at each call); default:
                compiled where it was built.

        Raises:
            TypeError, ValueError: tokens that are not integers in [0, 2^31), an unknown backend.
            BackendError: `cpu` was asked for and is not there.
        """
        if backend is None:
            backend = "reference" if _MISSING or backends.FORCED == "reference" else "cpu"
        check_choice("backend", backend, ("cpu", "reference"))
        if backend == "cpu":
            if _MISSING:
                raise BackendError(f"backend='cpu' cannot serve SuffixIndex: {_MISSING}")
            from . import _host

            self._index = _host.SuffixIndex()
        else:
            self._index = reference.SuffixIndex()
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes that the index holds."""
        return self._index.nbytes()

    def extend(self, tokens: Sequence[int] | Tensor) -> None:
        """Append committed tokens.

        Raises:
            TypeError, ValueError: tokens that are not integers in [0, 2^31), or more than 2^28 in all.
        """
        tokens = _int32(tokens)
        # A view of the tensor's memory; `tokens` outlives the call.
        self._index.extend(
            (ctypes.c_int32 * tokens.numel()).from_address(tokens.data_ptr()) if len(tokens) else array("i")
        )

    def longest_match(self) -> tuple[int, int]:
        """The longest suffix of the text that also ends earlier.

        Returns:
            Its length and the index of the token that followed its first occurrence; (0, 0) where there is none.
        """
        return self._index.longest_match()

    def propose_chain(self, k: int, *, min_match: int = 1, max_occurrences: int = 64) -> Tensor:
        """Continue the longest match.

        At each step the token that followed most often, among the occurrences that agree with the draft so far; the
        most recent one's on equal counts. An occurrence that reaches the end of the text goes on in the draft, so that
        a loop is drafted at any length.

        Args:
            k: tokens to draft.
            min_match: shortest match that is worth a draft.
            max_occurrences: most occurrences looked at; which ones, if there are more, is up to the backend.

        Returns:
            [k] int32, or [0] where no match is long enough.
        """
        check_int("k", k, 0)
        _check_limits(min_match, max_occurrences)
        return _tensor(self._index.propose_chain(k, min_match, max_occurrences))

    def propose_tree(
        self,
        max_nodes: int,
        *,
        branches: int = 4,
        max_depth: int = _MAX_DEPTH,
        min_match: int = 1,
        max_occurrences: int = 256,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue the longest match, then shorter ones, as a trie.

        Matches are taken from the longest to the shortest. Each adds the continuations of its occurrences to the
        counts, then nodes are taken while there is room: always the child of a taken node that was met most often;
        the shallower on equal counts, then the one met most recently.

        Args:
            max_nodes: most nodes, root included.
            branches: most children of one node.
            max_depth: most tokens below the root.
            min_match: shortest match that is looked at.
            max_occurrences: most occurrences looked at; which ones, if there are more, is up to the backend.

        Returns:
            tokens [n], parents [n] and frequencies [n] int32. Node 0 is the last token of the text; n = 0 for an empty
            text. A node's frequency is how many of the occurrences go through it.
        """
        check_int("max_nodes", max_nodes, 1)
        check_int("branches", branches, 1)
        check_int("max_depth", max_depth, 0)
        _check_limits(min_match, max_occurrences)
        columns = self._index.propose_tree(max_nodes, branches, max_depth, min_match, max_occurrences)
        tokens, parents, frequencies = (_tensor(column) for column in columns)
        return tokens, parents, frequencies


def propose_trees(indices: Sequence[SuffixIndex], max_nodes: int, *, device=None, **options) -> DraftTree:
    """One tree for each request from `SuffixIndex.propose_tree`; a request without a match gets its root alone.

    Siblings are a function of the context: verify with `target_only` or `greedy`, without draft_logits.

    Args:
        indices: the requests' indices, none of them empty.
        max_nodes: most nodes of each tree, root included.
        device: where the tree goes.
        options: the other arguments of `propose_tree`.

    Raises:
        ValueError: an index without tokens.
    """
    tokens, parents, sizes = [], [], [0]
    for request, index in enumerate(indices):
        if not len(index):
            raise ValueError(f"indices: expected tokens in each, got an empty index for request {request}")
        columns = index.propose_tree(max_nodes, **options)
        tokens.append(columns[0])
        parents.append(columns[1])
        sizes.append(len(columns[0]))
    none = torch.empty(0, dtype=torch.int32)
    cu_nodes = torch.tensor(sizes).cumsum(0).to(torch.int32)
    max_depth = min(max_nodes - 1, options.get("max_depth", _MAX_DEPTH))
    packed = (torch.cat([none, *tokens]), torch.cat([none, *parents]), cu_nodes)
    return DraftTree(*(column.to(device) for column in packed), max_nodes, max_depth)


def _check_limits(min_match: int, max_occurrences: int) -> None:
    check_int("min_match", min_match, 1, 2**31 - 1)
    check_int("max_occurrences", max_occurrences, 1)


def _int32(tokens) -> Tensor:
    """[n] int32 contiguous tensor of tokens in [0, 2^31); int32 memory is not copied."""
    if not isinstance(tokens, Tensor):
        try:
            view = memoryview(tokens)
        except TypeError:
            values = list(tokens)
            if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
                raise TypeError(f"tokens: expected integers, got {values[:4]}") from None
            for value in values:
                _check_id(value)
            return torch.tensor(values, dtype=torch.int32)
        if view.ndim != 1 or view.format not in ("i", "l", "q"):
            raise TypeError(
                f"tokens: expected one dimension of int32 or int64, got {view.ndim} of format {view.format!r}"
            )
        dtype = torch.int32 if view.itemsize == 4 else torch.int64
        if not len(view):
            return torch.empty(0, dtype=torch.int32)
        data = view if view.c_contiguous and not view.readonly else bytearray(view.tobytes())
        tokens = torch.frombuffer(data, dtype=dtype)
    if tokens.dtype not in _INTEGERS:
        raise TypeError(f"tokens: expected an integer dtype, got {str(tokens.dtype).removeprefix('torch.')}")
    if tokens.ndim != 1 or tokens.device.type != "cpu":
        raise ValueError(f"tokens: expected shape [n] on the CPU, got {list(tokens.shape)} on {tokens.device}")
    if tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        _check_id(low if low < 0 else high)
    return tokens.to(torch.int32).contiguous()


def _check_id(token: int) -> None:
    if not 0 <= token < 2**31:
        raise ValueError(f"tokens: expected ids in [0, 2^31), got {token}")


def _tensor(values) -> Tensor:
    """[n] int32 of a list or of the compiled index's buffer, which is not copied."""
    if isinstance(values, list) or not len(values):
        return torch.tensor(list(values) if isinstance(values, list) else [], dtype=torch.int32)
    return torch.frombuffer(values, dtype=torch.int32)
