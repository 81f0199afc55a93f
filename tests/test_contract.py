"""The public surface: names, signatures, results, and that every op has a schema, a reference and a fake."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import specdec_kernels as sk
from specdec_kernels import trees

ROOT = Path(__file__).resolve().parents[1]

# What verify_chain and verify_tree share after their method.
SHARED = {
    "draft_vocab": None,
    "params": sk.SamplingParams(),
    "draft_params": None,
    "rng": None,
    "accept_uniforms": None,
    "final_uniforms": None,
    "logprobs": False,
    "lossy": None,
    "backend": None,
}
HEAD = {
    "rows": None,
    "row_groups": None,
    "token_ids": None,
    "bias": None,
    "scale": None,
    "temperature": 1.0,
    "return_logits": False,
    "backend": None,
}
REQUIRED = inspect.Parameter.empty
# function -> (positional parameters, keyword-only parameters), each with its default.
SIGNATURES = {
    sk.verify_chain: (
        {"tokens": REQUIRED, "cu_nodes": REQUIRED, "target_logits": REQUIRED, "draft_logits": None},
        {"max_depth": REQUIRED, "method": "token", **SHARED},
    ),
    sk.verify_tree: (
        {"tree": REQUIRED, "target_logits": REQUIRED, "draft_logits": None},
        {"method": REQUIRED, **SHARED},
    ),
    sk.head_topk: ({"hidden": REQUIRED, "weight": REQUIRED, "k": 1}, HEAD),
    sk.quantize_head: ({"weight": REQUIRED, "dtype": "int8"}, {}),
    sk.head_sample: ({"hidden": REQUIRED, "weight": REQUIRED, "k": 1}, {"rng": REQUIRED, **HEAD}),
    sk.head_part: (
        {"hidden": REQUIRED, "weight": REQUIRED, "k": 1},
        {"rng": None, **{name: default for name, default in HEAD.items() if name != "return_logits"}},
    ),
    sk.tree_attention: (
        dict.fromkeys(("query", "key_cache", "value_cache", "tree", "prefix_lens"), REQUIRED),
        {
            **dict.fromkeys(
                (
                    *("block_table", "mask_bits", "layout", "shared", "scale", "window"),
                    *("softcap", "sinks", "k_scale", "v_scale"),
                ),
                None,
            ),
            "return_lse": False,
            "backend": None,
        },
    ),
    sk.compact_kv_: (
        dict.fromkeys(("caches", "nodes", "prefix_lens"), REQUIRED),
        {"block_table": None, "backend": None},
    ),
    trees.tree_layout: ({"tree": REQUIRED, "prefix_lens": None}, {"backend": None}),
}

FIELDS = {
    sk.DraftTree: ("tokens", "parents", "cu_nodes", "max_nodes", "max_depth", "counts"),
    sk.SamplingParams: ("temperature", "top_k", "top_p", "min_p", "allowed"),
    sk.Lossy: ("judge", "reflect_logits", "reflect_weight", "synthetic", "lenience"),
    sk.Philox: ("seed", "offset", "row"),
    sk.Verified: ("tokens", "nodes", "num_tokens", "logprobs"),
    sk.HeadTopK: ("logits", "tokens", "lse", "entropy", "all_logits"),
    sk.HeadPart: ("keys", "logits", "tokens", "sums"),
    sk.HeadSample: ("logits", "tokens", "lse", "entropy", "all_logits"),
    sk.QuantizedHead: ("values", "scales", "dim"),
    sk.TreeLayout: ("depths", "ancestor_bits", "positions"),
    sk.SharedPrefix: ("groups", "lens"),
}

OPS = (
    *("verify_chain", "verify_tree", "head_topk", "head_sample", "head_part"),
    *("tree_attention", "compact_kv_", "tree_layout"),
)


def _tree() -> sk.DraftTree:
    return sk.DraftTree.from_paths([[[3, 1], [2]], [[4]]], roots=[0, 1])


def _rng() -> sk.Philox:
    return sk.Philox(torch.tensor([5, 6]), torch.tensor([9, 12]))


def _chain(backend=None):
    tree = sk.DraftTree.chain(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    return sk.verify_chain(
        tree.tokens, tree.cu_nodes, torch.randn(6, 11), torch.randn(6, 11), max_depth=2, rng=_rng(), backend=backend
    )


def _verify_tree(backend=None):
    logits, draft = torch.randn(6, 11), torch.randn(6, 11)
    return sk.verify_tree(_tree(), logits, draft, method="without_replacement", rng=_rng(), backend=backend)


def _topk(backend=None):
    return sk.head_topk(torch.randn(2, 8), torch.randn(11, 8), k=3, return_logits=True, backend=backend)


def _sample(backend=None):
    return sk.head_sample(torch.randn(2, 8), torch.randn(11, 8), k=3, rng=_rng(), backend=backend)


def _part(backend=None):
    return sk.head_part(torch.randn(2, 8), torch.randn(11, 8), k=3, rng=_rng(), backend=backend)


def _attention(backend=None):
    cache = torch.randn(2, 2, 16, 8)
    lens = torch.tensor([5, 7], dtype=torch.int32)
    return sk.tree_attention(torch.randn(6, 4, 8), cache, cache, _tree(), lens, return_lse=True, backend=backend)


def _compact(backend=None):
    caches = [torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)]
    nodes = torch.tensor([[0, 2, -1], [0, 1, -1]], dtype=torch.int32)
    sk.compact_kv_(caches, nodes, torch.tensor([5, 7], dtype=torch.int32), backend=backend)
    return tuple(caches)


def _layout(backend=None):
    return trees.tree_layout(_tree(), backend=backend)


# One small call of each op, on the CPU; the seed is set before it.
CALLS = dict(zip(OPS, (_chain, _verify_tree, _topk, _sample, _part, _attention, _compact, _layout), strict=True))


def run(code: str, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter that finds packages in `cwd` first."""
    path = os.pathsep.join([str(cwd), str(cwd / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    parameters = inspect.signature(function).parameters.values()
    by_kind = [
        {p.name: p.default for p in parameters if p.kind is kind}
        for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    positional, keyword = SIGNATURES[function]
    assert list(by_kind[0].items()) == list(positional.items())
    assert by_kind[1] == keyword
    assert function.__doc__


@pytest.mark.parametrize("kind", FIELDS, ids=lambda t: t.__name__)
def test_fields(kind):
    assert kind._fields == FIELDS[kind]


def test_every_public_name_exists_and_no_other_op_is_declared():
    assert all(hasattr(sk, name) for name in sk.__all__)
    assert sorted(sk.backends.table()["reference"]["ops"]) == sorted(OPS)


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    packet = getattr(torch.ops.specdec_kernels, op)
    assert {"default", "reference"} <= set(packet.overloads())
    arguments = {
        overload: [(a.name, str(a.type)) for a in getattr(packet, overload)._schema.arguments]
        for overload in packet.overloads()
    }
    assert all(found == arguments["default"] for found in arguments.values())
    assert packet.default._schema.is_mutable == op.endswith("_")


@pytest.mark.parametrize("op", OPS)
def test_fake_agrees_with_reference(op):
    torch.manual_seed(0)
    real = CALLS[op](backend="reference")
    with FakeTensorMode():
        fake = CALLS[op](backend="reference")
    assert type(real) is type(fake)
    for left, right in zip(real, fake, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("op", OPS)
def test_default_agrees_with_reference(op):
    results = []
    for backend in (None, "reference"):
        torch.manual_seed(0)
        results.append(CALLS[op](backend=backend))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_that_cannot_serve_says_why(op):
    with pytest.raises(sk.BackendError, match=rf"^backend='cuda' cannot serve {op}: \S.*\S"):
        CALLS[op](backend="cuda")


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op):
    with pytest.raises(ValueError, match=r"^backend: expected one of 'reference', .*, got 'gpu'$"):
        CALLS[op](backend="gpu")


@pytest.mark.parametrize(("backend", "key"), [("cpu", "CPU"), ("cuda", "CUDA"), ("triton", None)])
def test_declared_kernels_are_registered(backend, key):
    found = sk.backends.table()[backend]
    if key is not None and not found["available"]:
        pytest.skip(f"{backend} backend: {found['reason']}")
    for op in found["ops"]:
        if key is None:
            assert backend in getattr(torch.ops.specdec_kernels, op).overloads()
        else:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"specdec_kernels::{op}", key), op


HEAD_CALL = """
import torch, specdec_kernels as sk
print(sk.head_topk(torch.ones(1, 4), torch.ones(3, 4)).tokens.tolist())
"""


def test_environment_forces_a_backend():
    served = run(HEAD_CALL, SPECDEC_BACKEND="reference")
    assert (served.returncode, served.stdout) == (0, "[[0]]\n"), served.stderr
    refused = run(HEAD_CALL, SPECDEC_BACKEND="cuda")
    assert refused.returncode != 0
    assert "BackendError: backend='cuda' cannot serve head_topk: " in refused.stderr
    unknown = run(HEAD_CALL, SPECDEC_BACKEND="gpu")
    assert "ValueError: SPECDEC_BACKEND: expected one of 'reference'" in unknown.stderr


def test_works_without_compiled_modules(tmp_path):
    shutil.copytree(ROOT / "specdec_kernels", tmp_path / "specdec_kernels", ignore=shutil.ignore_patterns("*.so"))
    # The finder of an editable install would look beside the sources, where the modules are.
    alone = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    found = run(alone + HEAD_CALL + "print(sk.backends.table()['cpu']['reason'])", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    first, reason = found.stdout.splitlines()
    assert first == "[[0]]"
    assert "specdec_kernels._C was not built" in reason


def test_imports_point_one_way():
    code = "import sys, specdec_kernels; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    found = run(code)
    assert found.returncode == 0, found.stderr
    loaded = set(found.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"specdec_loop", "transformers", "vllm", "sglang", "flashinfer"}
