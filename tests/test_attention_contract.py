"""Tree attention as an op: schema, tracing, and bad arguments by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attention_cases import NAN, Case
from specdec_kernels import attention, tree_attention, trees
from specdec_kernels.types import TreeLayout


def test_op_contract():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    paged = case.paged(4)
    tree = case.tree
    layout = trees.tree_layout(tree)
    seen = (layout.depths, layout.ancestor_bits, tree.cu_nodes, 3, case.prefix_lens)
    groups = torch.zeros(2, dtype=torch.int32)
    op = torch.ops.specdec_kernels.tree_attention.default
    dense = (case.query, case.keys, case.values, *seen, None, None, None, 0.3, 0, 0.0, None, None, None, False)
    torch.library.opcheck(op, dense)
    blocks = (case.query, paged["key_cache"], paged["value_cache"], *seen, paged["block_table"], groups, groups + 2)
    ones = torch.ones(2)
    torch.library.opcheck(op, (*blocks, 0.3, 4, 9.0, torch.ones(4), ones, ones, True))


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
    case.run()  # that these arguments fitted must not help the next ones
    with pytest.raises(error, match=message):
        case.run(**change)


def test_what_looks_like_arguments_that_fitted_is_checked():
    case = Case([[-1, 0], [-1, 0]], [6, 2])
    layout = trees.tree_layout(case.tree)
    case.run(layout=layout)
    chain = Case([[-1], [-1]], [6, 2])
    chain.run()
    with pytest.raises(TypeError, match=r"tree\.max_nodes: expected an int, got bool"):
        chain.run(tree=chain.tree._replace(max_nodes=True))
    with pytest.raises(TypeError, match="layout: expected a TreeLayout, got tuple"):
        case.run(layout=tuple(layout))
    with pytest.raises(TypeError, match="layout: expected a TreeLayout, got SimpleNamespace"):
        case.run(layout=SimpleNamespace(**layout._asdict()))
    with pytest.raises(TypeError, match="tree: expected a DraftTree, got SimpleNamespace"):
        tree = SimpleNamespace(**case.tree._asdict())
        tree_attention(case.query, case.keys, case.values, tree, case.prefix_lens, layout=layout)
    with pytest.raises(TypeError, match="query: expected a tensor, got ndarray"):
        case.run(query=case.query.numpy())
    with pytest.raises(TypeError, match="prefix_lens: expected a tensor, got list"):
        case.run(prefix_lens=[6, 2])


def test_what_fitted_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(attention, "_MOST_FITTING", 2)
    monkeypatch.setattr(attention, "_FITTING", fitting := {})
    for prefix in range(1, 6):
        Case([[-1, 0]], [prefix]).run()
        assert 1 <= len(fitting) <= 2


def test_symbolic_shapes_are_traced():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    layout = trees.tree_layout(case.tree)

    def attend(query, keys, values, prefix_lens, parents, cu_nodes, *layout):
        tree = case.tree._replace(parents=parents, cu_nodes=cu_nodes)
        return tree_attention(query, keys, values, tree, prefix_lens, layout=TreeLayout(*layout))

    given = (case.query, case.keys, case.values, case.prefix_lens, case.tree.parents, case.tree.cu_nodes, *layout)
    traced = make_fx(attend, tracing_mode="symbolic")(*given)
    assert traced(*given).equal(case.run())


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [-1, 2, 0, -1, 0]}, "tree.parents: expected parents before children, got 2 at index 1"),
        ({"parents": [-1, -1, 0, -1, 0]}, "tree.parents: expected -1 at each root and nowhere else, got -1 at index 1"),
        ({"cu_nodes": [0, 3, 4]}, "tree.cu_nodes: expected N=5 last, got 4"),
        ({"cu_nodes": [3, 2, 5]}, "tree.cu_nodes: expected 0 first, got 3"),
        ({"cu_nodes": [0, 5, 5]}, "tree.cu_nodes: expected 1..3 nodes a request, got 5 at index 0"),
        ({"max_nodes": 2}, "tree.cu_nodes: expected 1..2 nodes a request, got 3 at index 0"),
        ({"max_depth": 0}, "tree.max_depth: expected no node deeper than max_depth=0, got 1 at index 1"),
    ],
)
def test_debug_checks_read_the_tree(change, message, monkeypatch):
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    change = {k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in change.items()}
    tree = case.tree._replace(**change)
    assert case.run(tree=tree).isfinite().all()  # without the checks nothing leaves its tensor
    monkeypatch.setattr("specdec_kernels.tree_checks.DEBUG", True)
    case.run()
    with pytest.raises(ValueError, match=message):
        case.run(tree=tree)


def test_values_that_do_not_fit_stay_in_bounds():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2], spare=0)
    case.keys, case.values = case.keys.nan_to_num(), case.values.nan_to_num()
    want, paged = case.run(), case.paged(4)
    pools = {name: paged[name].nan_to_num() for name in ("key_cache", "value_cache")}
    for lens in ([6, -3], [6, 900]):
        for caches in ({}, paged | pools):
            got = case.run(prefix_lens=torch.tensor(lens, dtype=torch.int32), **caches)
            assert got.isfinite().all() and torch.allclose(got[:3], want[:3])
    for block in (-1, 10**6):
        assert (
            case.run(**paged | pools | {"block_table": torch.full_like(paged["block_table"], block)}).isfinite().all()
        )
    none = {name: pool[:0] for name, pool in pools.items()}
    assert (case.run(**paged | none) == 0).all()
    # One word of 64 bits for a tree of 70 nodes: the nodes behind max_nodes get nothing, the others what they see.
    long = Case([[-1, *range(69)]], [1])
    got, want = long.run(tree=long.tree._replace(max_nodes=64)), long.run()
    assert torch.allclose(got[:64], want[:64], atol=1e-6) and (got[64:] == 0).all()
