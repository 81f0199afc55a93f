"""Tree attention against attention along each path, one query and one head at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec_kernels import DraftTree, tree_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NAN = float("nan")


@dataclass
class Case:
    """Inputs of one call; the caches are dense, `paged()` makes the same ones in blocks."""

    requests: list[list[int]]  # parents of each tree
    prefixes: list[int]
    q_heads: int = 4
    kv_heads: int = 2
    size: int = 8
    value_size: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0
    spare: int = 5
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        sizes = [len(request) for request in self.requests]
        batch, self.length = len(sizes), max((p + n for p, n in zip(self.prefixes, sizes, strict=True)), default=0)
        self.length += self.spare
        self.query = normal(sum(sizes), self.q_heads, self.size)
        self.keys = normal(batch, self.kv_heads, self.length, self.size)
        self.values = normal(batch, self.kv_heads, self.length, self.value_size)
        for b, (prefix, n) in enumerate(zip(self.prefixes, sizes, strict=True)):
            self.keys[b, :, prefix + n :] = NAN
            self.values[b, :, prefix + n :] = NAN
        cu_nodes = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
        parents = torch.tensor([p for request in self.requests for p in request], dtype=torch.int32)
        self.tree = DraftTree(parents, parents, cu_nodes, max(sizes, default=1), max(sizes, default=1))
        self.prefix_lens = torch.tensor(self.prefixes, dtype=torch.int32)

    def run(self, device="cpu", **changes):
        arguments = {"query": self.query, "key_cache": self.keys, "value_cache": self.values, "tree": self.tree}
        arguments |= {"prefix_lens": self.prefix_lens, **self.options, **changes}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(device)
        tree = arguments["tree"]
        arguments["tree"] = tree._replace(parents=tree.parents.to(device), cu_nodes=tree.cu_nodes.to(device))
        return tree_attention(**arguments)

    def paged(self, block_size: int) -> dict:
        """The same caches in shuffled blocks; unused blocks hold NaN and unused table entries -1."""
        batch, columns = len(self.requests), -(-self.length // block_size)
        generator = torch.Generator().manual_seed(self.seed)
        blocks = batch * columns + 3
        table = torch.randperm(blocks, generator=generator)[: batch * columns].view(batch, columns).to(torch.int32)
        result = {}
        for name, dense in (("key_cache", self.keys), ("value_cache", self.values)):
            padded = torch.nn.functional.pad(dense.transpose(1, 2), (0, 0, 0, 0, 0, columns * block_size - self.length))
            pool = dense.new_full((blocks, block_size, self.kv_heads, dense.shape[-1]), NAN)
            pool[table.long().flatten()] = padded.reshape(batch * columns, *pool.shape[1:])
            result[name] = pool
        for b, (prefix, request) in enumerate(zip(self.prefixes, self.requests, strict=True)):
            table[b, -(-(prefix + len(request)) // block_size) :] = -1
        return result | {"block_table": table}


def naive(case: Case, mask=None, scale=None, window=None, softcap=None, sinks=None, k_scale=None, v_scale=None):
    """(out, lse) float64 of one softmax for each node and head over the slots that its path names."""
    rows = int(case.tree.cu_nodes[-1])
    out = torch.zeros(rows, case.q_heads, case.value_size, dtype=torch.float64)
    lse = torch.full((rows, case.q_heads), -math.inf, dtype=torch.float64)
    row = 0
    for b, (request, prefix) in enumerate(zip(case.requests, case.prefixes, strict=True)):
        depth = []
        for parent in request:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        for node in range(len(request)):
            path = [node]
            while request[path[-1]] >= 0:
                path.append(request[path[-1]])
            if mask is not None:
                path = [j for j in range(len(request)) if mask[row][j]]
            positions = {s: s for s in range(prefix)} | {prefix + j: prefix + depth[j] for j in path}
            here = prefix + depth[node]
            slots = [s for s, position in positions.items() if window is None or here - position < window]
            for head in range(case.q_heads):
                kv = head * case.kv_heads // case.q_heads
                keys = case.keys[b, kv, slots].double() * (1 if k_scale is None else float(k_scale[kv]))
                values = case.values[b, kv, slots].double() * (1 if v_scale is None else float(v_scale[kv]))
                scores = keys @ case.query[row, head].double() * (scale or case.size**-0.5)
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                extra = scores.new_empty(0) if sinks is None else sinks[head : head + 1].double()
                lse[row, head] = torch.logsumexp(torch.cat([scores, extra]), 0)
                if slots:
                    out[row, head] = torch.exp(scores - lse[row, head]) @ values
            row += 1
    return out, lse


def bits_of(mask: list[list[bool]], max_nodes: int) -> torch.Tensor:
    words = torch.zeros(len(mask), (max_nodes + 63) // 64, dtype=torch.int64)
    for row, seen in enumerate(mask):
        for j, sees in enumerate(seen):
            if sees:
                words[row, j // 64] |= 1 << (j % 64) if j % 64 < 63 else -(2**63)
    return words


def check(case: Case, **options):
    want, want_lse = naive(case, **options)
    given_options = {k: v for k, v in options.items() if k != "mask"}
    if options.get("mask") is not None:
        given_options["mask_bits"] = bits_of(options["mask"], case.tree.max_nodes)
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[case.dtype]
    for caches in ({}, case.paged(1), case.paged(4)):
        out, lse = case.run(return_lse=True, **caches, **given_options)
        assert out.dtype == case.dtype and lse.dtype == exact
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, atol=min(tolerance, 1e-4), rtol=min(tolerance, 1e-4))


@st.composite
def cases(draw):
    def parents():
        nodes = draw(st.integers(1, 70) if draw(st.integers(0, 4)) == 0 else st.integers(1, 9))
        return [-1, *(draw(st.integers(max(0, node - 4), node - 1)) for node in range(1, nodes))]

    batch = draw(st.integers(0, 3))
    q_heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]))
    return Case(
        requests=[parents() for _ in range(batch)],
        prefixes=[draw(st.integers(0, 20)) for _ in range(batch)],
        q_heads=q_heads,
        kv_heads=kv_heads,
        size=draw(st.sampled_from([4, 8, 15])),
        value_size=draw(st.sampled_from([4, 9])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_random_trees(case, data):
    generator = torch.Generator().manual_seed(case.seed)
    options = {}
    if data.draw(st.booleans(), "window"):
        options["window"] = data.draw(st.integers(1, 12), "window size")
    if data.draw(st.booleans(), "softcap"):
        options["softcap"] = 1.5
    if data.draw(st.booleans(), "sinks"):
        options["sinks"] = torch.randn(case.q_heads, generator=generator)
    if data.draw(st.booleans(), "scale"):
        options["scale"] = 0.3
    if data.draw(st.booleans(), "scales of the cache"):
        options["k_scale"] = torch.rand(case.kv_heads, generator=generator) + 0.5
        options["v_scale"] = torch.rand(case.kv_heads, generator=generator) + 0.5
    check(case, **options)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**30), st.one_of(st.none(), st.integers(1, 8)))
def test_mask_bits_of_any_graph(case, seed, window):
    """Several parents, later nodes, rows that see nothing, nodes that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    mask = []
    for request in case.requests:
        mask += (torch.rand(len(request), len(request), generator=generator) < 0.4).tolist()
    check(case, mask=mask, window=window)


def test_hidden_nodes_may_hold_nan_and_empty_rows_are_zero():
    case = Case([[-1, 0, 0]], [0])
    case.keys[0, :, 1], case.values[0, :, 1] = NAN, NAN
    mask = [[True, False, False], [False, False, False], [True, False, True]]
    check(case, mask=mask)
    out, lse = case.run(mask_bits=bits_of(mask, 3), return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    sinks = torch.arange(4.0)
    out, lse = case.run(mask_bits=bits_of(mask, 3), sinks=sinks, return_lse=True)
    assert (out[1] == 0).all() and lse[1].equal(sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(Case([[-1, 0, 1, 1, 0], [-1]], [33, 0], dtype=dtype), window=9, softcap=20.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_eight_bit_caches(dtype):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [5, 0])
    scale = 0.02 if dtype == torch.int8 else 0.5
    stored = [(cache.nan_to_num(0.0) / scale).clamp(-120, 120).to(dtype) for cache in (case.keys, case.values)]
    case.keys, case.values = (cache.float() for cache in stored)
    per_head = torch.full((2,), scale)
    want, _ = naive(case, k_scale=per_head, v_scale=per_head)
    for scales in (scale, per_head):
        out = case.run(key_cache=stored[0], value_cache=stored[1], k_scale=scales, v_scale=scales)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


def test_window_counts_positions_not_slots():
    """A sibling's slots must not push an ancestor out of the window: the defect of slot-counting kernels."""
    star = Case([[-1, *[0] * 8]], [3])
    wide = star.run(window=3)
    check(star, window=3)
    alone = Case([[-1, 0]], [3])
    alone.query, alone.tree = star.query[[0, 8]], alone.tree
    alone.keys = star.keys[:, :, [0, 1, 2, 3, 11]]
    alone.values = star.values[:, :, [0, 1, 2, 3, 11]]
    torch.testing.assert_close(alone.run(window=3)[1], wide[8])


def test_strides_of_the_cache_do_not_matter():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    want = case.run()
    by_slot = {"key_cache": case.keys.transpose(1, 2).contiguous().transpose(1, 2)}
    inside = torch.full((*case.values.shape[:3], 2 * case.value_size), NAN)
    inside[..., ::2] = case.values
    torch.testing.assert_close(case.run(**by_slot, value_cache=inside[..., ::2]), want)
    torch.testing.assert_close(case.run(query=case.query.transpose(0, 1).contiguous().transpose(0, 1)), want)


def test_requests_do_not_see_each_other(device):
    case = Case([[-1, 0, 0], [-1, 0, 1, 1], [-1]], [6, 0, 9])
    clean = case.run(device)
    case.keys[1] = NAN
    case.query[3:7] = NAN
    broken = case.run(device)
    assert broken[:3].equal(clean[:3]) and broken[7:].equal(clean[7:]) and broken[3:7].isnan().all()


def test_devices_agree(device):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [40, 0], dtype=torch.float64)
    for caches in ({}, case.paged(16)):
        out, lse = case.run(device, return_lse=True, window=7, k_scale=1.5, **caches)
        want = case.run(return_lse=True, window=7, k_scale=1.5)
        torch.testing.assert_close((out.cpu(), lse.cpu()), want)


def test_empty_batch_and_padding_rows():
    empty = Case([], [])
    out, lse = empty.run(return_lse=True)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    case = Case([[-1, 0]], [3])
    want = case.run()
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    padded = case.run(query=torch.cat([case.query, case.query]), tree=case.tree._replace(parents=parents))
    assert padded[:2].equal(want) and (padded[2:] == 0).all()


def test_op_contract():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    paged = case.paged(4)
    tree = case.tree
    plain = (case.query, case.keys, case.values, tree.parents, tree.cu_nodes, 3, case.prefix_lens)
    blocks = (case.query, paged["key_cache"], paged["value_cache"], *plain[3:])
    sees = tree.ancestor_bits()
    op = torch.ops.specdec_kernels.tree_attention.default
    torch.library.opcheck(op, (*plain, None, None, 0.3, 0, 0.0, None, None, None, False))
    ones = torch.ones(2)
    torch.library.opcheck(op, (*blocks, paged["block_table"], sees, 0.3, 4, 9.0, torch.ones(4), ones, ones, True))


def test_compiles_without_a_break():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    options = {"window": 5, "k_scale": 2.0, "return_lse": True}
    compiled = torch.compile(lambda **kw: tree_attention(**kw), fullgraph=True, backend="aot_eager")
    arguments = {"query": case.query, "key_cache": case.keys, "value_cache": case.values, "tree": case.tree}
    got = compiled(**arguments, prefix_lens=case.prefix_lens, **options)
    for a, b in zip(got, case.run(**options), strict=True):
        assert a.equal(b)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(5, 4)}, ValueError, r"query: expected shape \[N, Hq, D\], got \[5, 4\]"),
        ({"query": torch.zeros(5, 4, 8, dtype=torch.int64)}, TypeError, "query: expected dtype float32 .* got int64"),
        ({"query": torch.zeros(5, 3, 8)}, ValueError, "query: expected Hq to be a multiple of Hkv=2, got Hq=3"),
        ({"query": torch.zeros(4, 4, 8)}, ValueError, r"tree.parents: expected shape \[N=4\], got \[5\]"),
        ({"prefix_lens": ints(3)}, ValueError, r"prefix_lens: expected shape \[B=2\], got \[3\]"),
        ({"prefix_lens": ints(2).long()}, TypeError, "prefix_lens: expected dtype int32, got int64"),
        ({"key_cache": torch.zeros(2, 2, 9, 7)}, ValueError, r"key_cache: expected shape \[B=2, Hkv=2, L=9, D=8\]"),
        ({"value_cache": torch.zeros(2, 2, 8, 8)}, ValueError, "value_cache: expected shape .*L=14.*got"),
        ({"value_cache": torch.zeros(2, 2, 14, 8).half()}, TypeError, "value_cache: expected the dtype of key_cache"),
        ({"mask_bits": ints(5, 1)}, TypeError, "mask_bits: expected dtype int64, got int32"),
        ({"mask_bits": ints(5, 2).long()}, ValueError, r"mask_bits: expected shape \[N=5, W=1\], got \[5, 2\]"),
        ({"window": 0}, ValueError, "window: expected >= 1, got 0"),
        ({"window": 2.0}, TypeError, "window: expected an int, got float"),
        ({"scale": "big"}, TypeError, "scale: expected a number, got str"),
        ({"scale": NAN}, ValueError, "scale: expected a finite number, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number >= 0 or None, got -1.0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \[Hq=4\], got \[2\]"),
        ({"k_scale": torch.zeros(4)}, ValueError, r"k_scale: expected shape \[Hkv=2\], got \[4\]"),
        ({"v_scale": [1.0]}, TypeError, "v_scale: expected a number, got list"),
        ({"backend": "fast"}, ValueError, "backend: expected one of 'reference'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    with pytest.raises(error, match=message):
        case.run(**change)


def test_bad_trees_and_block_tables_are_named():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    with pytest.raises(TypeError, match="tree: expected a DraftTree, got NoneType"):
        tree_attention(case.query, case.keys, case.values, None, case.prefix_lens)
    paged = case.paged(4)
    with pytest.raises(ValueError, match=r"block_table: expected shape \[B=2, M\], got \[3, 4\]"):
        case.run(**paged | {"block_table": ints(3, 4)})
    with pytest.raises(TypeError, match="block_table: expected dtype int32, got int64"):
        case.run(**paged | {"block_table": paged["block_table"].long()})
    with pytest.raises(ValueError, match=r"key_cache: expected block_size >= 1, got \[3, 0, 2, 8\]"):
        case.run(**paged | {name: torch.zeros(3, 0, 2, 8) for name in ("key_cache", "value_cache")})


def test_debug_checks_read_values(monkeypatch):
    monkeypatch.setattr("specdec_kernels.attention.DEBUG", True)
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    case.run()
    with pytest.raises(ValueError, match="prefix_lens: expected prefix and tree within 14 slots, got 12 at index 0"):
        case.run(prefix_lens=torch.tensor([12, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"prefix_lens: .* got -1 at index 1"):
        case.run(prefix_lens=torch.tensor([6, -1], dtype=torch.int32))
    paged = case.paged(4)
    case.run(**paged)
    paged["block_table"][1, 0] = -1
    with pytest.raises(ValueError, match=r"block_table: expected blocks in 0..\d+, got -1 at index 4"):
        case.run(**paged)
