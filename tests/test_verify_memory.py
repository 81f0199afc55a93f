"""What a call on the CPU takes beside its arguments, and logits that 32-bit offsets cannot reach."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from malloc_peak import peak, peaks_of, report
from specdec_kernels import backends
from tree_cases import FORM_IDS, FORMS, Case, Spec, random_case
from verify_margins import assert_same_walks

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

VOCABULARY, BATCH = 128_256, 8
SHAPE = [-1] + [node // 4 for node in range(31)]  # 32 nodes, 4 siblings
VARIANTS = {
    "plain": {},
    "filters": {"params": sk.SamplingParams(top_k=50, top_p=0.9), "draft_params": sk.SamplingParams(top_p=0.9)},
    "trimmed": {"trimmed": True, "params": sk.SamplingParams(min_p=0.01)},
}


def calls():
    """(name, call) for every method and variant, over logits that are made once."""
    g = torch.Generator().manual_seed(0)
    nodes = BATCH * len(SHAPE)
    target = torch.randn(nodes, VOCABULARY, generator=g, dtype=torch.bfloat16) * 3
    draft = target + torch.randn(nodes, VOCABULARY, generator=g, dtype=torch.bfloat16)
    vocab = torch.arange(0, VOCABULARY, 4, dtype=torch.int32)
    compact = draft[:, ::4].contiguous()
    best = 4 * compact.topk(4).indices.to(torch.int32)
    tokens = best.reshape(BATCH, -1)[:, : len(SHAPE) - 1]  # node 4 i + 1 + j is the j-th child of node i
    tokens = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int32), tokens], 1).reshape(-1)
    cu_nodes = torch.arange(BATCH + 1, dtype=torch.int32) * len(SHAPE)
    parents = torch.tensor(SHAPE, dtype=torch.int32).repeat(BATCH)
    tree = sk.DraftTree(tokens, parents, cu_nodes, len(SHAPE), 3)
    chain = (tokens, cu_nodes)
    rng = sk.Philox(torch.arange(BATCH), torch.arange(BATCH))
    for (method, is_chain), form in zip(FORMS, FORM_IDS, strict=True):
        for name, options in VARIANTS.items():
            options = {"method": method, "rng": rng, "logprobs": True, "backend": "cpu", **options}
            q = compact if options.pop("trimmed", False) else draft
            if q is compact:
                options["draft_vocab"] = vocab
            if is_chain:
                options["max_depth"] = len(SHAPE) - 1
            verify, drafts = (sk.verify_chain, chain) if is_chain else (sk.verify_tree, (tree,))
            yield (
                f"{form} {name}",
                lambda verify=verify, drafts=drafts, q=q, options=options: verify(*drafts, target, q, **options),
            )


def measure() -> dict[str, int]:
    """Peak bytes of each call beyond what was in use before it."""
    row = torch.zeros(VOCABULARY, dtype=torch.bfloat16)
    peaks = {}
    for name, call in [("one row in fp32", row.float), *calls()]:
        peaks[name] = peak(call)[0]
    return peaks


def test_extra_memory_does_not_grow_with_the_vocabulary(tmp_path):
    peaks = peaks_of(__file__, tmp_path)
    assert peaks.pop("one row in fp32") >= 4 * VOCABULARY, "the counter sees what torch allocates"
    assert len(peaks) == len(FORMS) * len(VARIANTS)
    limit = 2**20 + 64 * BATCH * len(SHAPE)
    assert max(peaks.values()) < limit, {name: peak for name, peak in peaks.items() if peak >= limit}


@pytest.mark.parametrize(("method", "chain"), [("token", True), ("without_replacement", False), ("traversal", False)])
def test_rows_beyond_two_to_the_31_elements(method, chain):
    """A request whose rows lie there is verified as it is elsewhere; no page between is touched."""
    shape = list(range(-1, 11)) if chain else [-1] + [node // 2 for node in range(11)]
    spec = Spec(method, chain, 1, 1, len(shape), VOCABULARY, dtype=torch.bfloat16, distance=0.3)
    near = random_case(spec, [shape])
    before = 2**31 // VOCABULARY + 1  # nodes of the request in front, of which only the root is a token
    assert before * VOCABULARY > 2**31

    def far(logits):
        room = torch.empty(before + len(shape), VOCABULARY, dtype=torch.bfloat16)
        room[0], room[before:] = 0.0, logits
        return room

    def behind(values, first):
        return torch.cat([torch.full((before,), first, dtype=torch.int32).index_fill(0, torch.tensor(0), -1), values])

    case = Case(
        method, behind(near.tokens, -1), None if chain else behind(near.parents, 0),
        torch.tensor([0, before, before + len(shape)], dtype=torch.int32), far(near.target), far(near.draft),
        before, near.max_depth if not chain else before - 1,
    )  # fmt: skip
    rng = sk.Philox(*(torch.cat([x, x]) for x in near.options["rng"][:2]))
    case.options = {**near.options, "rng": rng}
    got, expected = case.run("cpu"), near.run("reference")
    width = expected.tokens.shape[1]
    assert got.num_tokens[0] == 1
    found = sk.Verified(*(x[1:, :width] if x.dim() == 2 else x[1:] for x in got))
    assert_same_walks(near, found, expected, "cpu")


if __name__ == "__main__":
    report(measure)
