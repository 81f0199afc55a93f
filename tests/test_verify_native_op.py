"""The ops of verification as compiled code registers them: what they refuse, how they are traced."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import backends
from tree_cases import FORM_IDS, FORMS, Case, Spec, random_case
from verify_backends import assert_same_bits

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
EVERY_METHOD = pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)


def arguments_of(case: Case, **options):
    """(the op, {name: argument}) of the call that the public function makes."""
    op = torch.ops.specdec_kernels.verify_chain if case.parents is None else torch.ops.specdec_kernels.verify_tree
    results = case.run("reference", **options)
    if results.logprobs is None:
        results = results._replace(logprobs=torch.empty(len(results.num_tokens), 0))
    with mock.patch("specdec_kernels.verify.library.overload") as overload:
        overload.return_value.return_value = tuple(results)
        case.run("cpu", **options)
    names = [argument.name for argument in op.default._schema.arguments]
    return op, dict(zip(names, overload.return_value.call_args.args, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "block"}, "no method 'block' for trees"),
        ({"method": "token"}, "no method 'token' for trees"),
        ({"params": torch.ones(3, 4)}, "params: expected"),
        ({"params": torch.ones(7, 4, dtype=torch.float64)}, "params: unexpected dtype"),
        ({"scalars": [1.0]}, "scalars: expected 4"),
        ({"target_logits": torch.zeros(3, 16)}, "tokens: expected"),
        ({"draft_logits": torch.zeros(3, 16)}, "draft_logits: expected"),
        ({"draft_logits": None}, "draft_logits: method 'k_seq' needs them"),
        ({"draft_vocab": torch.zeros(3, dtype=torch.int32)}, "draft_logits: expected"),
        ({"counts": torch.zeros(3, dtype=torch.int32)}, "counts: expected"),
        ({"judge": torch.zeros(3, dtype=torch.bool)}, "judge: expected"),
        ({"reflect_logits": torch.zeros(3, 16)}, "reflect_logits: expected"),
        ({"synthetic": torch.zeros(99)}, "synthetic: expected"),
        ({"accept_uniforms": torch.zeros(3)}, "accept_uniforms: expected"),
        ({"seed": None}, "expected seed and offset, or both uniforms"),
        ({"max_nodes": 0}, "max_nodes: expected 1"),
        ({"max_nodes": 2**31}, "max_nodes: expected 1"),
        ({"max_depth": -1}, "max_depth: expected 0"),
        ({"max_depth": 2**63 - 1}, "max_depth: expected 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_op_says_what_it_cannot_do(change, message):
    """A call past the public function's checks is refused, not answered out of bounds."""
    op, arguments = arguments_of(random_case(Spec("k_seq", False, 19, 7, vocabulary=16)))
    with pytest.raises(RuntimeError, match=message):
        op(*{**arguments, **change}.values())


# Without padding where there are logprobs: opcheck takes NaN for a difference.
@EVERY_METHOD
@pytest.mark.parametrize(("nodes", "logprobs"), [(5, False), (1, True)])
def test_opcheck(method, chain, nodes, logprobs):
    case = random_case(Spec(method, chain, 20, 3, nodes, 16, trimmed=8, filters="k"))
    op, arguments = arguments_of(case, logprobs=logprobs)
    torch.library.opcheck(op.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("method", "chain"), [("token", True), ("block", True), ("traversal", False), ("k_seq", False)]
)
def test_compiles_as_one_graph(method, chain):
    case = random_case(Spec(method, chain, 21, 4, vocabulary=111, trimmed=30, filters="p"))
    options = {"method": method, "logprobs": True, **case.options}

    def verify(target, draft):
        if chain:
            return sk.verify_chain(case.tokens, case.cu_nodes, target, draft, max_depth=case.max_depth, **options)
        tree = sk.DraftTree(case.tokens, case.parents, case.cu_nodes, case.max_nodes, case.max_depth)
        return sk.verify_tree(tree, target, draft, **options)

    assert_same_bits(torch.compile(verify, fullgraph=True)(case.target, case.draft), case.run("cpu"))
