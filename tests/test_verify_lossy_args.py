"""Lossy hooks that are refused: errors name the field, what came and what was expected."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import DraftTree, Lossy, verify_chain, verify_tree
from specdec_kernels.verify import TREE_METHODS
from verify_cases import streams

V = 9
CHAIN = DraftTree.chain(torch.ones(2, 3, dtype=torch.int32))
N = len(CHAIN.tokens)
LOGITS = torch.zeros(N, V)
JUDGE = torch.zeros(N, dtype=torch.bool)
REFUSED = [
    *(
        (method, Lossy(judge=JUDGE), ValueError, rf"^lossy.judge: expected None with method '{method}', which accepts")
        for method in ("block", "traversal", "traversal_iid")
    ),
    *(
        (method, Lossy(lenience=0.5), ValueError, rf"^lossy.lenience: expected 1 with method '{method}', got 0.5; only")
        for method in ("block", "greedy", "target_only", "greedy_multi", "typical", "traversal", "traversal_iid")
    ),
    ("token", (None, None), TypeError, "^lossy: expected a Lossy or None, got tuple"),
    ("token", Lossy(judge=JUDGE[1:]), ValueError, r"^lossy.judge: expected shape \[N=6\], got \[5\]"),
    ("token", Lossy(judge=JUDGE.int()), TypeError, "^lossy.judge: expected dtype bool, got int32"),
    ("token", Lossy(judge=[True] * N), TypeError, "^lossy.judge: expected a tensor, got list"),
    ("token", Lossy(lenience=0.0), ValueError, r"^lossy.lenience: expected a number in \(0, 1\], got 0.0"),
    ("token", Lossy(lenience=1.5), ValueError, r"^lossy.lenience: expected a number in \(0, 1\], got 1.5"),
    ("token", Lossy(lenience=float("nan")), ValueError, r"^lossy.lenience: expected a number in \(0, 1\], got nan"),
    ("token", Lossy(lenience=torch.ones(2)), TypeError, r"^lossy.lenience: expected a number in \(0, 1\], got Tensor"),
    ("token", Lossy(reflect_logits=LOGITS[:, 1:]), ValueError, r"^lossy.reflect_logits: expected shape \[N=6, V=9\]"),
    ("token", Lossy(reflect_logits=LOGITS.half()), TypeError, "^lossy.reflect_logits: expected dtype float32, got"),
    ("token", Lossy(reflect_weight=1.0), ValueError, r"^lossy.reflect_weight: expected a number in \[0, 1\), got 1.0"),
    ("token", Lossy(reflect_weight=-0.1), ValueError, r"^lossy.reflect_weight: expected a number in \[0, 1\), got"),
    ("token", Lossy(reflect_weight=None), TypeError, r"^lossy.reflect_weight: expected a number in \[0, 1\), got None"),
    ("block", Lossy(synthetic=1.5), ValueError, r"^lossy.synthetic: expected a number in \[0, 1\], .* got 1.5"),
    ("token", Lossy(synthetic=True), TypeError, r"^lossy.synthetic: expected a number in \[0, 1\], .* got bool"),
    ("token", Lossy(synthetic=torch.ones(3)), ValueError, r"^lossy.synthetic: expected shape \[max_depth=2\], got"),
    ("token", Lossy(synthetic=torch.ones(2).long()), TypeError, "^lossy.synthetic: expected dtype float32, got int64"),
    ("token", Lossy(JUDGE, synthetic=0.5), ValueError, "^lossy.synthetic: expected None beside lossy.judge"),
    ("k_seq", Lossy(synthetic=0.5, lenience=0.5), ValueError, "^lossy.synthetic: expected None beside lossy.lenience"),
]


@pytest.mark.parametrize("method,lossy,error,message", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(method, lossy, error, message):
    with pytest.raises(error, match=message):
        call(method, lossy=lossy, rng=streams(2))


def call(method, **options):
    if method in TREE_METHODS:
        return verify_tree(CHAIN, LOGITS, LOGITS, method=method, **options)
    return verify_chain(CHAIN.tokens, CHAIN.cu_nodes, LOGITS, LOGITS, max_depth=2, method=method, **options)


@pytest.mark.parametrize("method", ["greedy", "typical"])
def test_synthetic_needs_coins_even_where_the_method_does_not(method):
    final = torch.zeros(2)
    with pytest.raises(ValueError, match=f"^accept_uniforms: method '{method}' needs rng or accept_uniforms"):
        call(method, lossy=Lossy(synthetic=0.5), final_uniforms=final)
    found = call(method, lossy=Lossy(synthetic=0.5), final_uniforms=final, accept_uniforms=torch.zeros(N))
    assert found.num_tokens.tolist() == [3, 3]
