"""Verification kernels: one program walks one request."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coins import coins_of, final_coin
from .request import Request
from .rows import Rows, row_at
from .traversal import walk_traversal
from .tree import children_tokens, load_tree
from .walks import token_logprob, walk_by_rate, walk_down, walk_greedy, walk_typical
from .weights import NOT_SUMMED, Left, draw, mass, untouched


@triton.jit
def rows_of(
    b, data, stride, column_stride, size, words, words_stride, word_stride, vocab,
    other, other_stride, other_column_stride, mix,
    params, temperature, top_k, top_p, min_p,
):  # fmt: skip
    """Rows with the numbers of request b."""
    if params is not None:
        temperature = tl.load(params + 4 * b)
        if top_k is not None:
            top_k, top_p, min_p = tl.load(params + 4 * b + 1), tl.load(params + 4 * b + 2), tl.load(params + 4 * b + 3)
    if top_k is not None:
        top_k, top_p, min_p = tl.cast(top_k, tl.float32), tl.cast(top_p, tl.float32), tl.cast(min_p, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    return Rows(
        data=data, stride=stride, column_stride=column_stride, size=size, words=words, words_stride=words_stride,
        word_stride=word_stride, vocab=vocab, other=other, other_stride=other_stride,
        other_column_stride=other_column_stride, mix=mix, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p,
    )  # fmt: skip


@triton.jit
def last_token(r, walk, METHOD: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr):
    """The token that follows the path: one draw of what the walk left of p."""
    last = walk.p.best
    if METHOD != "greedy":
        target = row_at(r.target, r.first + walk.node, walk.p.cut)
        if walk.sound & ~target.greedy:
            draft = row_at(r.draft, r.first + walk.node, walk.q.cut)
            left, out = walk.left, None
            if EXCLUDE:
                out = children_tokens(r.tree, walk.node, left.since, left.until)
            if METHOD == "target_only" or METHOD == "greedy_multi" or METHOD == "k_seq":
                if left.m == NOT_SUMMED:
                    total = mass(left, target, walk.p, draft, walk.q, out, BLOCK)
                    left = Left(c=left.c, d=left.d, m=total, since=left.since, until=left.until)
                if left.m <= 0:  # of probability 0, but rounding may reach it; then p stands in
                    left = untouched(walk.node)
                    if EXCLUDE:
                        out = tl.full(out.shape, -1, tl.int32)
            ticket = final_coin(r.coins).to(tl.float64) * left.m
            last = draw(ticket, left, target, walk.p, draft, walk.q, out, BLOCK)
    return last


@triton.jit(do_not_specialize=["N", "R", "max_nodes", "max_depth"])
def verify_kernel(
    tokens,  # [N] int32
    parents,  # [N] int32 local nodes; None: chains
    cu_nodes,  # [B+1] int32
    counts,  # [N] int32 merged draws, or None
    target_logits,  # [N, V]
    draft_logits,  # [N, V], or [N, R] with draft_vocab; None: point masses
    draft_vocab,  # [R] int32 ascending, or None
    params,  # [B, 4] fp32 temperature, top_k, top_p, min_p; or None: the four numbers below
    draft_params,  # the same for draft_logits
    allowed,  # [N, ceil(V/32)] int32, or None
    draft_allowed,  # [N, ceil(V/32)] int32, or None
    judge,  # [N] uint8, or None
    reflect_logits,  # [N, V], or None
    synthetic,  # [max_depth] fp32, or None
    seed,  # [B] int64, or None
    offset,  # [B] int64, or None
    accept_uniforms,  # [N] fp32, or None
    final_uniforms,  # [B] fp32, or None
    out_tokens,  # [B, max_depth+1] int32
    out_nodes,  # [B, max_depth+1] int32
    out_count,  # [B] int32
    out_logprobs,  # [B, max_depth+1] fp32, or None
    temperature,
    top_k,  # fp32 each; None where nothing can be filtered
    top_p,
    min_p,
    draft_temperature,
    draft_top_k,
    draft_top_p,
    draft_min_p,
    reflect_weight,  # share of reflect_logits
    lenience,
    N,
    V,
    R,  # columns of draft_logits
    max_nodes,
    max_depth,
    target_stride,  # elements between rows, then between columns
    target_column_stride,
    draft_stride,
    draft_column_stride,
    allowed_stride,
    allowed_word_stride,
    draft_allowed_stride,
    draft_allowed_word_stride,
    reflect_stride,
    reflect_column_stride,
    METHOD: tl.constexpr,  # a method of verify_tree, or "synthetic"
    EXCLUDE: tl.constexpr,  # whether the tokens of rejected siblings are out of what is left of p
    NODES: tl.constexpr,  # power of two >= max_nodes; of no meaning for chains
    WIDTH: tl.constexpr,  # power of two >= max_depth+1
    BLOCK: tl.constexpr,
):
    """Walk the tree of request `program_id(0)` and write its row of every output."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(cu_nodes + b), 0).to(tl.int64)
    end = tl.minimum(tl.load(cu_nodes + b + 1), N).to(tl.int64)
    size = tl.minimum(end - first, max_nodes).to(tl.int32)
    target = rows_of(
        b, target_logits, target_stride, target_column_stride, V, allowed, allowed_stride, allowed_word_stride, None,
        reflect_logits, reflect_stride, reflect_column_stride, reflect_weight,
        params, temperature, top_k, top_p, min_p,
    )  # fmt: skip
    draft = rows_of(
        b, draft_logits, draft_stride, draft_column_stride, R, draft_allowed, draft_allowed_stride,
        draft_allowed_word_stride, draft_vocab, None, 0, 1, 0.0,
        draft_params, draft_temperature, draft_top_k, draft_top_p, draft_min_p,
    )  # fmt: skip
    verdicts = judge
    if judge is not None:
        verdicts += first
    r = Request(
        tree=load_tree(tokens, parents, counts, first, size, max_depth, V, NODES), target=target, draft=draft,
        coins=coins_of(b, first, accept_uniforms, final_uniforms, seed, offset), judge=verdicts, synthetic=synthetic,
        lenience=lenience, first=first,
    )  # fmt: skip
    exists = size > 0
    LOGPROBS: tl.constexpr = out_logprobs is not None
    if METHOD == "greedy":
        walk = walk_greedy(r, exists, WIDTH, BLOCK)
    elif METHOD == "typical":
        walk = walk_typical(r, exists, WIDTH, BLOCK)
    elif METHOD == "synthetic":
        walk = walk_by_rate(r, exists, LOGPROBS, WIDTH, BLOCK)
    elif METHOD == "traversal" or METHOD == "traversal_iid":
        walk = walk_traversal(r, exists, METHOD == "traversal_iid", EXCLUDE, WIDTH, BLOCK)
    else:
        walk = walk_down(r, exists, METHOD, EXCLUDE, WIDTH, BLOCK)
    last = last_token(r, walk, METHOD, EXCLUDE, BLOCK)

    count = tl.where(walk.sound, walk.depth + 1, 0)
    lane = tl.arange(0, WIDTH)
    out = b * (max_depth + 1) + lane
    on_path = lane + 1 < count
    emitted = tl.load(tokens + first + walk.path, mask=on_path, other=-1)
    tl.store(out_tokens + out, tl.where(lane == count - 1, last, emitted), mask=lane <= max_depth)
    tl.store(out_nodes + b * (max_depth + 1), tl.where(count > 0, 0, -1))
    tl.store(out_nodes + out + 1, tl.where(on_path, walk.path, -1), mask=lane < max_depth)
    tl.store(out_count + b, count)
    if LOGPROBS:
        value = float("nan")
        if count > 0:
            value = token_logprob(r.target, r.first + walk.node, walk.p, last)
        values = tl.where(lane == count - 1, value, tl.where(on_path, walk.logprobs, float("nan")))
        tl.store(out_logprobs + out, values, mask=lane <= max_depth)


# One program reads its rows alone, so it wants many loads under way: wide blocks, many warps.
MAX_BLOCK = 4096

# What the kernel calls the methods of verify_chain; those of verify_tree keep their names.
_CHAIN_METHODS = {"token": "multi_round", "block": "traversal_iid"}
# Methods that never look at the draft's logits.
_TARGET_METHODS = ("greedy", "target_only", "typical", "synthetic")
# Methods that exclude tokens of siblings whatever they were drawn from, and those that do so for point masses only.
_EXCLUDING = ("target_only", "greedy_multi", "without_replacement", "traversal")
_EXCLUDING_POINTS = ("multi_round", "traversal_iid")
_OFF = (0.0, 1.0, 0.0)  # top_k, top_p, min_p that change nothing


def launch_options(vocabulary: int, max_nodes: int, max_depth: int) -> dict:
    """Compile-time sizes and launch options. Without contraction `u * q < p` is what every other backend computes."""
    block = min(max(triton.next_power_of_2(vocabulary), 16), MAX_BLOCK)
    return {
        "NODES": triton.next_power_of_2(max(max_nodes, 2)),
        "WIDTH": triton.next_power_of_2(max_depth + 1),
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 16),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _numbers(prefix: str, params: Tensor | None, scalars) -> dict:
    """Sampling numbers by kernel argument; filters are None where none can be on."""
    off = params is None and tuple(scalars[1:]) == _OFF
    filters = (None, None, None) if off else (float(value) for value in scalars[1:])
    return dict(
        zip(
            (f"{prefix}temperature", f"{prefix}top_k", f"{prefix}top_p", f"{prefix}min_p"),
            (float(scalars[0]), *filters),
            strict=True,
        )
    )


def tree_arguments(
    tokens, parents, cu_nodes, counts, target_logits, draft_logits, draft_vocab, max_nodes, max_depth, method,
    params, scalars, allowed, draft_params, draft_scalars, draft_allowed,
    judge, reflect_logits, reflect_weight, synthetic, lenience,
    seed, offset, accept_uniforms, final_uniforms, logprobs,
):  # fmt: skip
    """(the op's outputs, the kernel's arguments by name) for the arguments of the op `verify_tree`.

    Rows keep their strides; everything small is made dense, which copies nothing where it already is.
    """
    batch, width = cu_nodes.shape[0] - 1, max_depth + 1
    out_tokens = cu_nodes.new_empty((batch, width), dtype=torch.int32)
    outputs = (
        out_tokens,
        torch.empty_like(out_tokens),
        cu_nodes.new_empty((batch,), dtype=torch.int32),
        cu_nodes.new_empty((batch, width if logprobs else 0), dtype=torch.float32),
    )
    if method == "greedy":  # the argmax, whatever the temperature
        params, scalars = None, (0.0, *_OFF)
    if synthetic is not None:
        method = "synthetic"
    if method in _TARGET_METHODS:
        draft_logits = draft_vocab = draft_params = draft_allowed = None
        draft_scalars = (1.0, *_OFF)
    small = {
        "tokens": tokens,
        "parents": parents,
        "cu_nodes": cu_nodes,
        "counts": counts,
        "draft_vocab": draft_vocab,
        "params": params,
        "draft_params": draft_params,
        "judge": None if judge is None else judge.view(torch.uint8),
        "synthetic": synthetic,
        "seed": seed,
        "offset": offset,
        "accept_uniforms": accept_uniforms,
        "final_uniforms": final_uniforms,
    }
    arguments = {name: None if tensor is None else tensor.contiguous() for name, tensor in small.items()}
    arguments |= _numbers("", params, scalars) | _numbers("draft_", draft_params, draft_scalars)
    arguments |= {
        "out_tokens": outputs[0],
        "out_nodes": outputs[1],
        "out_count": outputs[2],
        "out_logprobs": outputs[3] if logprobs else None,
        "reflect_weight": float(reflect_weight),
        "lenience": float(lenience),
        "N": tokens.shape[0],
        "V": target_logits.shape[1],
        "R": 0 if draft_logits is None else draft_logits.shape[1],
        "max_nodes": max_nodes,
        "max_depth": max_depth,
        "METHOD": method,
        "EXCLUDE": method in _EXCLUDING or (method in _EXCLUDING_POINTS and draft_logits is None),
    }
    for prefix, name, tensor in (
        ("target", "target_logits", target_logits),
        ("draft", "draft_logits", draft_logits),
        ("allowed", "allowed", allowed),
        ("draft_allowed", "draft_allowed", draft_allowed),
        ("reflect", "reflect_logits", reflect_logits),
    ):
        unit = "word" if "allowed" in prefix else "column"
        arguments[name] = tensor
        arguments[f"{prefix}_stride"], arguments[f"{prefix}_{unit}_stride"] = (
            (0, 1) if tensor is None else tensor.stride()
        )
    return outputs, arguments


def chain_arguments(tokens, cu_nodes, target_logits, draft_logits, draft_vocab, max_depth, method, *sampling):
    """The same for the arguments of the op `verify_chain`: a tree in which the child of node i is node i+1."""
    return tree_arguments(
        tokens, None, cu_nodes, None, target_logits, draft_logits, draft_vocab, max_depth + 1, max_depth,
        _CHAIN_METHODS.get(method, method), *sampling,
    )  # fmt: skip


def _launch(outputs, arguments):
    batch, width = outputs[0].shape
    if batch:
        logits = arguments["target_logits"]
        # Of a chain's nodes nothing is kept, so their number makes no further kernel.
        nodes = 1 if arguments["parents"] is None else arguments["max_nodes"]
        options = launch_options(logits.shape[1], nodes, width - 1)
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            verify_kernel[(batch,)](**arguments, **options)
    return outputs


def verify_chain(*op_arguments):
    """Triton kernel of the op `verify_chain`."""
    return _launch(*chain_arguments(*op_arguments))


def verify_tree(*op_arguments):
    """Triton kernel of the op `verify_tree`."""
    return _launch(*tree_arguments(*op_arguments))
