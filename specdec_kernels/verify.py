"""Verification: accept or reject drafted chains and trees without changing the target's output law."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, library
from .checks import (
    DEBUG,
    FLOATS,
    INT32,
    check_choice,
    check_int,
    check_tensor,
)
from .reference import verify as reference
from .types import DraftTree, Lossy, Philox, SamplingParams, Verified
from .verify_args import check_arguments, check_values_of

CHAIN_METHODS = ("token", "block", "greedy", "typical")
TREE_METHODS = (
    "greedy",
    "target_only",
    "multi_round",
    "without_replacement",
    "k_seq",
    "greedy_multi",
    "typical",
    "traversal",
    "traversal_iid",
)
_TAKES_COUNTS = ("multi_round", "k_seq")

# What both ops end with: `params` [B, 4] fp32 holds temperature, top_k, top_p, min_p of each request and, where it is
# given, replaces the four numbers of `scalars`, so that plain numbers cost no launch.
_SAMPLING = (
    "Tensor? params, float[] scalars, Tensor? allowed, "
    "Tensor? draft_params, float[] draft_scalars, Tensor? draft_allowed, "
    "Tensor? judge, Tensor? reflect_logits, float reflect_weight, Tensor? synthetic, float lenience, "
    "Tensor? seed, Tensor? offset, Tensor? accept_uniforms, Tensor? final_uniforms, bool logprobs) "
    "-> (Tensor tokens, Tensor nodes, Tensor num_tokens, Tensor logprobs)"
)
_CHAIN = (
    "(Tensor tokens, Tensor cu_nodes, Tensor target_logits, Tensor? draft_logits, Tensor? draft_vocab, "
    "int max_depth, str method, " + _SAMPLING
)
_TREE = (
    "(Tensor tokens, Tensor parents, Tensor cu_nodes, Tensor? counts, Tensor target_logits, Tensor? draft_logits, "
    "Tensor? draft_vocab, int max_nodes, int max_depth, str method, " + _SAMPLING
)


def _results(cu_nodes: Tensor, max_depth: int, logprobs: bool):
    """Shapes and dtypes of both ops' results; `logprobs` is [B, 0] where nobody asked for it."""
    batch, width = cu_nodes.shape[0] - 1, max_depth + 1
    path = cu_nodes.new_empty((batch, width), dtype=torch.int32)
    return (
        path,
        torch.empty_like(path),
        cu_nodes.new_empty((batch,), dtype=torch.int32),
        cu_nodes.new_empty((batch, width if logprobs else 0), dtype=torch.float32),
    )


def _chain_fake(tokens, cu_nodes, target_logits, draft_logits, draft_vocab, max_depth, method, *sampling):
    return _results(cu_nodes, max_depth, sampling[-1])


def _tree_fake(
    tokens, parents, cu_nodes, counts, target_logits, draft_logits, draft_vocab, max_nodes, max_depth, *rest
):
    return _results(cu_nodes, max_depth, rest[-1])


def _triton(name: str):
    """The Triton kernels import triton, so they are looked up when they are first called."""

    def call(*args):
        from .triton import verify

        return getattr(verify, name)(*args)

    return call


library.declare(
    "verify_chain", _CHAIN, reference=reference.verify_chain, fake=_chain_fake, triton=_triton("verify_chain")
)
library.declare("verify_tree", _TREE, reference=reference.verify_tree, fake=_tree_fake, triton=_triton("verify_tree"))


def _compiled_limit(*, dtype, **_) -> str | None:
    return None if dtype in FLOATS else f"logits are {dtype}"


for _op in ("verify_chain", "verify_tree"):
    for _backend in ("cpu", "triton", "cuda"):
        backends.serves(_op, _backend, _compiled_limit)


def _wrap(results, logprobs: bool) -> Verified:
    tokens, nodes, num_tokens, values = results
    return Verified(tokens, nodes, num_tokens, values if logprobs else None)


def verify_chain(
    tokens: Tensor,
    cu_nodes: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None = None,
    *,
    max_depth: int,
    method: str = "token",
    draft_vocab: Tensor | None = None,
    params: SamplingParams = SamplingParams(),
    draft_params: SamplingParams | None = None,
    rng: Philox | None = None,
    accept_uniforms: Tensor | None = None,
    final_uniforms: Tensor | None = None,
    logprobs: bool = False,
    lossy: Lossy | None = None,
    backend: str | None = None,
) -> Verified:
    """Verify one drafted chain for each request.

    Methods: `token` (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318) and `block` (Sun et al., 2403.10444)
    leave the target's output law unchanged; so does `greedy`, which compares with the target's argmax. `typical`
    (Medusa, 2401.10774) is LOSSY: it accepts where p(x) > min(0.09, 0.3 exp(-H(p))). So is every method with a hook of
    `lossy`.

    Args:
        tokens: [N] int32, all chains packed: the root (last committed token), then its drafts. A draft of -1 is no
            draft: the chain ends before it.
        cu_nodes: [B+1] int32, cumulative node counts, from 0 to N.
        target_logits: [N, V] fp32, bf16 or fp16 (fp64 on the reference); row i predicts what follows node i.
        draft_logits: [N, V] or, with `draft_vocab`, [N, R]; row i is the distribution from which node i+1 was drawn.
            A chain's last row is never read, and none is by `greedy` and `typical`. None: each draft token was a point
            mass (n-gram, greedy draft).
        max_depth: most drafts in one chain, K.
        method: `token`, `block`, `greedy` or `typical`.
        draft_vocab: [R] int32, ascending target ids of the drafter's trimmed vocabulary; q is zero outside it.
        params: how target logits become p. temperature 0 makes that request greedy.
        draft_params: the same for q; default: the temperature of `params`, no filters. It must be what the drafter
            really sampled from, or the law is lost.
        rng: random stream; seed and absolute position of each root.
        accept_uniforms: [N] fp32 in [0, 1), replaces rng: node i's acceptance uses entry i.
        final_uniforms: [B] fp32 in [0, 1), replaces rng for the one token that is drawn.
        logprobs: also return log-probabilities of the emitted tokens.
        lossy: hooks that change the law; see `Lossy`. Default: none.
        backend: force `reference`, `cpu`, `triton` or `cuda`.

    Returns:
        Verified. A request for which a row that was read holds NaN, +inf or nothing finite gets num_tokens 0 and -1.
        Rows that the walk never reaches are not read.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected. Checks of
            values (ids, cu_nodes, parents, uniforms) run under SPECDEC_DEBUG=1.
        BackendError: `backend` cannot serve the call.
    """
    check_choice("method", method, CHAIN_METHODS)
    check_int("max_depth", max_depth, 0)
    chain = DraftTree(tokens, None, cu_nodes, max_depth + 1, max_depth)
    draft, tail, facts = check_arguments(
        chain, "", target_logits, draft_logits, draft_vocab, method, params, draft_params, lossy, rng,
        accept_uniforms, final_uniforms, logprobs,
    )  # fmt: skip
    if DEBUG:
        check_values_of(chain, "", target_logits.shape[1], draft_vocab, accept_uniforms, final_uniforms)
    op = library.overload("verify_chain", backends.select("verify_chain", tokens.device.type, backend, **facts))
    return _wrap(op(tokens, cu_nodes, target_logits, *draft, max_depth, method, *tail), logprobs)


def verify_tree(
    tree: DraftTree,
    target_logits: Tensor,
    draft_logits: Tensor | None = None,
    *,
    method: str,
    draft_vocab: Tensor | None = None,
    params: SamplingParams = SamplingParams(),
    draft_params: SamplingParams | None = None,
    rng: Philox | None = None,
    accept_uniforms: Tensor | None = None,
    final_uniforms: Tensor | None = None,
    logprobs: bool = False,
    lossy: Lossy | None = None,
    backend: str | None = None,
) -> Verified:
    """Verify one drafted tree for each request. The method must match how siblings were drawn:

    =====================  =====================================================================================
    `greedy`               any tree; follows the target's argmax
    `target_only`          siblings that are a function of the context (EAGLE-2, 2406.16858); one coin per parent
    `multi_round`          siblings drawn i.i.d. from q (SpecInfer, 2305.09781)
    `without_replacement`  siblings drawn without replacement from q, in draw order (RSD, 2402.14160)
    `k_seq`                siblings drawn i.i.d. from q (SpecTr, 2310.15141)
    `greedy_multi`         the top k-1 tokens of q, then one draw of the rest of q (2502.18779)
    `traversal`            siblings without replacement, verified bottom-up over the whole tree (2505.12398)
    `traversal_iid`        the same for siblings drawn i.i.d.
    `typical`              LOSSY (Medusa, 2401.10774): longest path with p(x) > min(0.09, 0.3 exp(-H(p)))
    =====================  =====================================================================================

    All but `typical` leave the target's output law unchanged, unless `lossy` is given.

    Args:
        tree: parents before children, siblings in draw order. A token of -1 is no draft and takes no mass. Equal
            siblings are allowed where draws are i.i.d. `tree.counts` (`multi_round`, `k_seq` only) merges them: the
            draws are then tried in a uniformly random order, for which `rng` is required, because grouping equal draws
            biases the law from three draws on. `greedy_multi` takes the last sibling for the draw, so that one must not
            be -1.
        target_logits: [N, V] fp32, bf16 or fp16 (fp64 on the reference); row i predicts the children of node i.
        draft_logits: [N, V] or, with `draft_vocab`, [N, R]; row i is the distribution from which the children of node
            i were drawn. Rows of leaves are never read, and none is by `greedy`, `target_only` and `typical`. None:
            every draft token was a point mass.
        method: see above.
        draft_vocab: [R] int32, ascending target ids of the drafter's trimmed vocabulary; q is zero outside it.
        params, draft_params, rng, accept_uniforms, final_uniforms, logprobs, lossy, backend: as for `verify_chain`.
            With `target_only` entry i of accept_uniforms is the coin of parent i, else that of the test of node i
            (`greedy_multi`: of the last sibling; the first sibling's entry draws the token that may be a sibling).

    Returns:
        Verified. A request for which a row that was read holds NaN, +inf or nothing finite gets num_tokens 0 and -1.
        Rows that the walk never reaches are not read: below a rejected node, and bottom-up below a node whose token p
        cannot give.

    Raises:
        TypeError, ValueError, BackendError: as for `verify_chain`.
    """
    check_choice("method", method, TREE_METHODS)
    if not isinstance(tree, DraftTree):
        raise TypeError(f"tree: expected a DraftTree, got {type(tree).__name__}")
    check_int("tree.max_nodes", tree.max_nodes, 1)
    check_int("tree.max_depth", tree.max_depth, 0)
    draft, tail, facts = check_arguments(
        tree, "tree.", target_logits, draft_logits, draft_vocab, method, params, draft_params, lossy, rng,
        accept_uniforms, final_uniforms, logprobs,
    )  # fmt: skip
    sizes = {"N": target_logits.shape[0]}
    check_tensor("tree.parents", tree.parents, sizes, "N", INT32, target_logits.device)
    if tree.counts is not None:
        if method not in _TAKES_COUNTS:
            raise ValueError(f"tree.counts: expected None with method {method!r}, which takes draws one node each")
        check_tensor("tree.counts", tree.counts, sizes, "N", INT32, target_logits.device)
    if DEBUG:
        check_values_of(tree, "tree.", target_logits.shape[1], draft_vocab, accept_uniforms, final_uniforms)
    op = library.overload("verify_tree", backends.select("verify_tree", tree.tokens.device.type, backend, **facts))
    results = op(
        tree.tokens, tree.parents, tree.cu_nodes, tree.counts, target_logits, *draft,
        tree.max_nodes, tree.max_depth, method, *tail,
    )  # fmt: skip
    return _wrap(results, logprobs)
