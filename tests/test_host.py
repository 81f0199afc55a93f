"""The suffix index against brute force over all earlier positions."""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import BackendError, host

pytestmark = pytest.mark.native
NATIVE = pytest.mark.skipif(host._MISSING is not None, reason=str(host._MISSING))
BACKENDS = [pytest.param("cpu", marks=NATIVE), "reference"]
ALL = 10**6  # more occurrences than any text here has


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


# Few symbols and repeated pieces, so that matches are long and overlap.
texts = st.one_of(
    st.lists(st.integers(0, 2), max_size=40),
    st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 8)).map(lambda t: t[0] * t[1]),
    st.lists(st.sampled_from([[1, 2, 3], [2, 3], [7], [1, 2]]), max_size=14).map(
        lambda parts: [*chain.from_iterable(parts)]
    ),
)


def occurrences(text: list[int], length: int) -> list[int]:
    """Ends of the earlier occurrences of the last `length` tokens."""
    return [end for end in range(length, len(text)) if text[end - length : end] == text[len(text) - length :]]


@NATIVE
@settings(max_examples=150, deadline=None)
@given(texts, st.lists(st.integers(0, 40), max_size=3), st.data())
def test_native_equals_reference(text, cuts, data):
    native, reference = host.SuffixIndex(backend="cpu"), host.SuffixIndex(backend="reference")
    cuts = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, end in pairwise(cuts):
        for index in (native, reference):
            index.extend(text[start:end])
    assert len(native) == len(reference) == len(text)
    assert native.longest_match() == reference.longest_match()
    min_match = data.draw(st.integers(1, 4))
    limits = {"min_match": min_match, "max_occurrences": ALL}
    assert native.propose_chain(9, **limits).equal(reference.propose_chain(9, **limits))
    tree = {**limits, "branches": data.draw(st.integers(1, 3)), "max_depth": data.draw(st.integers(0, 5))}
    nodes = data.draw(st.integers(1, 20))
    for a, b in zip(native.propose_tree(nodes, **tree), reference.propose_tree(nodes, **tree), strict=True):
        assert a.equal(b)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_longest_match_is_the_longest(text):
    for backend in ("reference", "cpu") if host._MISSING is None else ("reference",):
        length, following = host.SuffixIndex(text, backend=backend).longest_match()
        assert occurrences(text, length + 1) == []
        assert following == (occurrences(text, length)[0] if length else 0)


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(1, 6), st.integers(1, 30), st.integers(1, 3))
def test_proposals_follow_occurrences(text, limit, max_nodes, branches):
    """Whatever part of the occurrences is looked at, every proposed path really followed one of them."""
    for backend in ("reference", "cpu") if host._MISSING is None else ("reference",):
        index = host.SuffixIndex(text, backend=backend)
        length, _ = index.longest_match()
        draft = index.propose_chain(5, max_occurrences=limit).tolist()
        assert len(draft) == (5 if length else 0)
        longer = text + draft
        assert not length or any(longer[end : end + 5] == draft for end in occurrences(text, length))
        tokens, parents, frequencies = (
            column.tolist()
            for column in index.propose_tree(max_nodes, branches=branches, max_depth=4, max_occurrences=limit)
        )
        assert len(tokens) <= max_nodes and tokens[:1] == text[-1:]
        assert max(Counter(parents[1:]).values(), default=0) <= branches
        assert not frequencies or frequencies[0] <= limit
        paths = [[]] * bool(tokens)
        for node in range(1, len(tokens)):
            assert parents[node] < node and 1 <= frequencies[node] <= frequencies[parents[node]]
            paths.append([*paths[parents[node]], tokens[node]])
            followed = [text[end : end + len(paths[-1])] for end in range(1, len(text)) if text[end - 1] == text[-1]]
            assert followed.count(paths[-1]) >= frequencies[node]
        assert len({tuple(path) for path in paths}) == len(paths)


def test_chain_prefers_frequent_then_recent_continuations_and_unrolls_loops(backend):
    index = host.SuffixIndex([9, 1, 5, 9, 2, 6, 9, 1, 7, 9], backend=backend)
    assert index.propose_chain(2).tolist() == [1, 7]  # 1 twice; then 7 came last
    index = host.SuffixIndex([4, 1, 2, 3, 1, 2, 3, 1], backend=backend)
    assert index.propose_chain(7).tolist() == [2, 3, 1, 2, 3, 1, 2]
    assert index.propose_chain(7, min_match=5).numel() == 0
    assert index.propose_chain(0).numel() == 0


def test_tree_backs_off_to_shorter_matches(backend):
    # "1 2" was followed by 3; "2" alone twice by 4.
    index = host.SuffixIndex([1, 2, 3, 8, 2, 4, 8, 2, 4, 0, 1, 2], backend=backend)
    tokens, parents, frequencies = index.propose_tree(6, max_depth=2)
    assert tokens.tolist() == [2, 3, 8, 4, 0, 8] and parents.tolist() == [-1, 0, 1, 0, 3, 3]
    assert frequencies.tolist() == [3, 1, 1, 2, 1, 1]
    assert index.propose_tree(6, max_depth=2, min_match=2)[0].tolist() == [2, 3, 8]
    assert index.propose_tree(6, max_depth=1, branches=1)[0].tolist() == [2, 3]


@NATIVE
def test_long_texts_stay_exact_and_small():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 3000, (20_000,), generator=generator)
    text[15_000:15_600] = text[200:800]
    index = host.SuffixIndex(text[:15_600])
    assert index.longest_match()[0] >= 600
    assert index.propose_chain(64).tolist() == text[800:864].tolist()
    index.extend(text[15_600:])
    assert index.nbytes < 300 * len(index)
    loop = host.SuffixIndex([1] * 50_000)
    assert loop.longest_match() == (49_999, 49_999) and loop.propose_chain(100).tolist() == [1] * 100
    assert loop.propose_tree(8, max_depth=4)[0].tolist() == [1] * 5


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 6, 5],
        (5, 6, 5),
        torch.tensor([5, 6, 5]),
        torch.tensor([5, 6, 5], dtype=torch.int32),
        torch.tensor([5, 0, 6, 0, 5])[::2],
        torch.tensor([5, 6, 5], dtype=torch.uint8),
        array("i", [5, 6, 5]),
        array("q", [5, 6, 5]),
        memoryview(array("i", [5, 0, 6, 0, 5]))[::2],
        memoryview(array("i", [5, 6, 5])).toreadonly(),
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_tokens_in_any_form(tokens, backend):
    index = host.SuffixIndex(tokens, backend=backend)
    index.extend([])
    index.extend(array("i"))
    index.extend(torch.empty(0, dtype=torch.int64))
    assert len(index) == 3 and index.propose_chain(1).tolist() == [6]


def test_numpy_arrays(backend):
    numpy = pytest.importorskip("numpy")
    for dtype in (numpy.int32, numpy.int64):
        assert host.SuffixIndex(numpy.array([5, 6, 5], dtype), backend=backend).propose_chain(1).tolist() == [6]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1.5], TypeError, r"tokens: expected integers, got \[1.5\]"),
        ([True], TypeError, r"tokens: expected integers, got \[True\]"),
        ([1, -3], ValueError, r"tokens: expected ids in \[0, 2\^31\), got -3"),
        ([2**31], ValueError, r"tokens: expected ids in \[0, 2\^31\), got 2147483648"),
        (torch.tensor([2**40 + 1]), ValueError, r"tokens: expected ids in \[0, 2\^31\), got 1099511627777"),
        (torch.tensor([-(2**40)]), ValueError, r"tokens: expected ids in \[0, 2\^31\), got -"),
        (torch.tensor([1.0]), TypeError, "tokens: expected an integer dtype, got float32"),
        (torch.tensor([[1]]), ValueError, r"tokens: expected shape \[n\] on the CPU, got \[1, 1\] on cpu"),
        (array("d", [1.0]), TypeError, "tokens: expected one dimension of int32 or int64, got 1 of format 'd'"),
    ],
)
def test_bad_tokens_are_named_and_change_nothing(tokens, error, message, backend):
    index = host.SuffixIndex([1, 2, 1], backend=backend)
    with pytest.raises(error, match=message):
        index.extend(tokens)
    assert len(index) == 3 and index.longest_match() == (1, 1)


def test_bad_arguments_are_named(backend, monkeypatch):
    index = host.SuffixIndex([1, 2, 1], backend=backend)
    for call, message in [
        (lambda: index.propose_chain(-1), "k: expected >= 0, got -1"),
        (lambda: index.propose_chain(1, min_match=0), r"min_match: expected in 1..2147483647, got 0"),
        (lambda: index.propose_chain(1, max_occurrences=0), "max_occurrences: expected >= 1, got 0"),
        (lambda: index.propose_tree(0), "max_nodes: expected >= 1, got 0"),
        (lambda: index.propose_tree(1, branches=0), "branches: expected >= 1, got 0"),
        (lambda: index.propose_tree(1, max_depth=-1), "max_depth: expected >= 0, got -1"),
        (lambda: host.SuffixIndex(backend="gpu"), "backend: expected one of 'cpu', 'reference', got 'gpu'"),
        (lambda: host.propose_trees([index, host.SuffixIndex()], 4), "indices: .* empty index for request 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr(host, "_MISSING", "it was not built")
    with pytest.raises(BackendError, match="backend='cpu' cannot serve SuffixIndex: it was not built"):
        host.SuffixIndex(backend="cpu")
    assert host.SuffixIndex([1, 2, 1]).propose_chain(1).tolist() == [2]  # falls back where nobody forced it


@NATIVE
def test_the_compiled_module_refuses_other_buffers():
    from specdec_kernels import _host

    with pytest.raises(ValueError, match="tokens: expected a contiguous buffer of int32, got format 'q'"):
        _host.SuffixIndex().extend(array("q", [1]))


def test_trees_of_a_batch(backend):
    indices = [host.SuffixIndex(text, backend=backend) for text in ([1, 2, 1], [7], [3, 4, 5, 3, 4])]
    tree = host.propose_trees(indices, 4, max_depth=2)
    assert tree.cu_nodes.tolist() == [0, 3, 4, 7] and (tree.max_nodes, tree.max_depth) == (4, 2)
    assert tree.tokens.tolist() == [1, 2, 1, 7, 4, 5, 3] and tree.parents.tolist() == [-1, 0, 1, -1, -1, 0, 1]
    assert tree.depths().tolist() == [0, 1, 2, 0, 0, 1, 2]
    empty = host.propose_trees([], 4)
    assert empty.cu_nodes.tolist() == [0] and empty.tokens.numel() == 0


@NATIVE
def test_threads_may_share_an_index():
    index = host.SuffixIndex([1, 2, 3])
    pieces = [[t] * 500 for t in range(8)]
    threads = [threading.Thread(target=index.extend, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        index.propose_tree(16)
    for thread in threads:
        thread.join()
    assert len(index) == 3 + 8 * 500
