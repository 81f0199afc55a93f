"""Chain verification: one program walks one request."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coins import ACCEPT, FINAL, uniform
from .rows import Lse, Row, column_of, draw, is_sound, logits_at, logprob, lse, prob, residual_mass

# Of a temperature near 0 the reciprocal overflows; a finite one still makes 0 * inverse = 0 at the peak.
LARGEST_INVERSE = tl.constexpr(1.7e38)


@triton.jit
def row_of(data, i, stride, column_stride, size, words, words_stride, word_stride, vocab, temperature):
    """Row i of `data` [N, size] and of its mask `words`, each of which may be None."""
    hot = temperature > 0
    row = data
    if data is not None:
        row = data + i * stride
    mask = words
    if words is not None:
        mask = words + i * words_stride
    return Row(
        data=row, stride=column_stride, size=size, words=mask, words_stride=word_stride, vocab=vocab,
        inverse_temperature=tl.minimum(1.0 / tl.where(hot, temperature, 1.0), LARGEST_INVERSE), greedy=~hot,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "R", "max_depth"])
def verify_chain_kernel(
    tokens,  # [N] int32
    cu_nodes,  # [B+1] int32
    target_logits,  # [N, V]
    draft_logits,  # [N, V], or [N, R] with draft_vocab; None: point masses
    draft_vocab,  # [R] int32 ascending, or None
    params,  # [B, 4] fp32, or None; temperature is column 0
    draft_params,  # [B, 4] fp32, or None
    allowed,  # [N, ceil(V/32)] int32, or None
    draft_allowed,  # [N, ceil(V/32)] int32, or None
    seed,  # [B] int64, or None
    offset,  # [B] int64, or None
    accept_uniforms,  # [N] fp32, or None
    final_uniforms,  # [B] fp32, or None
    out_tokens,  # [B, max_depth+1] int32
    out_nodes,  # [B, max_depth+1] int32
    out_count,  # [B] int32
    out_logprobs,  # [B, max_depth+1] fp32, or None
    temperature,  # of all requests where params is None
    draft_temperature,  # of all requests where draft_params is None
    N,
    V,
    R,  # columns of draft_logits
    max_depth,
    target_stride,  # elements between rows, then between columns
    target_column_stride,
    draft_stride,
    draft_column_stride,
    allowed_stride,
    allowed_word_stride,
    draft_allowed_stride,
    draft_allowed_word_stride,
    GREEDY: tl.constexpr,  # temperature 0 for all, so that nothing is ever drawn
    WIDTH: tl.constexpr,  # power of two >= max_depth+1
    BLOCK: tl.constexpr,
):
    """Walk the chain of request `program_id(0)` and write its row of every output."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(cu_nodes + b), 0).to(tl.int64)
    end = tl.minimum(tl.load(cu_nodes + b + 1), N).to(tl.int64)
    drafts = tl.minimum(end - first - 1, max_depth).to(tl.int32)
    if params is not None:
        temperature = tl.load(params + 4 * b)
    if draft_params is not None:
        draft_temperature = tl.load(draft_params + 4 * b)
    lane = tl.arange(0, WIDTH)
    values = tl.full([WIDTH], float("nan"), tl.float32)

    # The residual of the row at which the walk ends is (p - c q)+: c = 1 after a rejection, 0 where nothing was tried.
    c = 0.0
    drafted = -1
    accepted = 0
    top, best, mass = 0.0, 0, 0.0
    draft_top, draft_best, draft_mass = 0.0, 0, 0.0
    sound = first < end
    walking = sound
    while walking:
        i = first + accepted
        target = row_of(
            target_logits, i, target_stride, target_column_stride, V, allowed, allowed_stride, allowed_word_stride,
            None, temperature,
        )  # fmt: skip
        p_found = lse(target, V, BLOCK)
        top, best, mass = p_found.top, p_found.best, p_found.mass
        sound = is_sound(p_found)
        walking = False
        drafted = tl.load(tokens + i + 1, mask=accepted < drafts, other=-1)
        if sound & (drafted >= 0) & (drafted < V):
            x = logits_at(target, drafted, drafted >= 0, drafted)
            p = prob(target, p_found, x, drafted)
            q = 1.0
            if draft_logits is not None:
                draft = row_of(
                    draft_logits, i, draft_stride, draft_column_stride, R, draft_allowed, draft_allowed_stride,
                    draft_allowed_word_stride, draft_vocab, draft_temperature,
                )  # fmt: skip
                q_found = lse(draft, V, BLOCK)
                draft_top, draft_best, draft_mass = q_found.top, q_found.best, q_found.mass
                sound = is_sound(q_found)
                column, present = column_of(draft, drafted)
                y = logits_at(draft, column, present, drafted)
                q = tl.where(present, prob(draft, q_found, y, column), 0.0)
            u = uniform(accept_uniforms, i + 1, seed, offset, b, ACCEPT, accepted + 1)
            if sound & (u * q < p):
                values = tl.where(lane == accepted, logprob(target, p_found, x, drafted), values)
                accepted += 1
                walking = True
            else:
                c = 1.0

    i = first + accepted
    target = row_of(
        target_logits, i, target_stride, target_column_stride, V, allowed, allowed_stride, allowed_word_stride,
        None, temperature,
    )  # fmt: skip
    draft = row_of(
        draft_logits, i, draft_stride, draft_column_stride, R, draft_allowed, draft_allowed_stride,
        draft_allowed_word_stride, draft_vocab, draft_temperature,
    )  # fmt: skip
    p_found = Lse(top=top, best=best, mass=mass)
    q_found = Lse(top=draft_top, best=draft_best, mass=draft_mass)
    last = best
    if not GREEDY:  # noqa: SIM102 (decided when compiling; the next at run time)
        if sound & ~target.greedy:
            total = residual_mass(c, target, p_found, draft, q_found, drafted, BLOCK)
            if total <= 0:  # of probability 0, but rounding may reach it
                c = 0.0
                total = residual_mass(c, target, p_found, draft, q_found, drafted, BLOCK)
            u = uniform(final_uniforms, b, seed, offset, b, FINAL, 0)
            last = draw(u.to(tl.float64) * total, c, target, p_found, draft, q_found, drafted, BLOCK)

    # Every slot is written once: two stores of one slot by different threads would need a barrier.
    count = tl.where(sound, accepted + 1, 0)
    path = tl.load(tokens + first + 1 + lane, mask=lane < count - 1, other=-1)
    path = tl.where(lane == count - 1, last, path)
    out = b * (max_depth + 1) + lane
    tl.store(out_tokens + out, path, mask=lane <= max_depth)
    tl.store(out_nodes + out, tl.where(lane < count, lane, -1), mask=lane <= max_depth)
    tl.store(out_count + b, count)
    if out_logprobs is not None:
        x = logits_at(target, last, sound, last)
        values = tl.where(lane == count - 1, logprob(target, p_found, x, last), values)
        values = tl.where(lane < count, values, float("nan"))
        tl.store(out_logprobs + out, values, mask=lane <= max_depth)


# One program reads its rows alone, so it wants many loads under way: wide blocks, many warps.
MAX_BLOCK = 4096


def launch_options(vocabulary: int, max_depth: int) -> dict:
    """Compile-time sizes and launch options. Without contraction `u * q < p` is what every other backend computes."""
    block = min(max(triton.next_power_of_2(vocabulary), 16), MAX_BLOCK)
    return {
        "WIDTH": triton.next_power_of_2(max_depth + 1),
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 16),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 1) if tensor is None else tensor.stride()


def chain_arguments(
    tokens, cu_nodes, target_logits, draft_logits, draft_vocab, max_depth, method,
    params, scalars, allowed, draft_params, draft_scalars, draft_allowed,
    seed, offset, accept_uniforms, final_uniforms, logprobs,
):  # fmt: skip
    """(the op's outputs, the kernel's arguments by name) for the op's arguments.

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
    greedy = method == "greedy"
    if greedy:  # the argmax, whatever the temperature
        params, scalars, draft_logits, draft_vocab, draft_params, draft_allowed = None, (0.0,), None, None, None, None
    small = {
        "tokens": tokens,
        "cu_nodes": cu_nodes,
        "draft_vocab": draft_vocab,
        "params": params,
        "draft_params": draft_params,
        "seed": seed,
        "offset": offset,
        "accept_uniforms": accept_uniforms,
        "final_uniforms": final_uniforms,
    }
    arguments = {name: None if tensor is None else tensor.contiguous() for name, tensor in small.items()}
    arguments |= {
        "target_logits": target_logits,
        "draft_logits": draft_logits,
        "allowed": allowed,
        "draft_allowed": draft_allowed,
        "out_tokens": outputs[0],
        "out_nodes": outputs[1],
        "out_count": outputs[2],
        "out_logprobs": outputs[3] if logprobs else None,
        "temperature": float(scalars[0]),
        "draft_temperature": float(draft_scalars[0]),
        "N": tokens.shape[0],
        "V": target_logits.shape[1],
        "R": 0 if draft_logits is None else draft_logits.shape[1],
        "max_depth": max_depth,
        "GREEDY": greedy,
    }
    arguments["target_stride"], arguments["target_column_stride"] = _strides(target_logits)
    arguments["draft_stride"], arguments["draft_column_stride"] = _strides(draft_logits)
    arguments["allowed_stride"], arguments["allowed_word_stride"] = _strides(allowed)
    arguments["draft_allowed_stride"], arguments["draft_allowed_word_stride"] = _strides(draft_allowed)
    return outputs, arguments


def verify_chain(*op_arguments):
    """Triton kernel of the op `verify_chain`, methods `token` and `greedy`, without filters."""
    outputs, arguments = chain_arguments(*op_arguments)
    batch, width = outputs[0].shape
    if batch:
        logits = arguments["target_logits"]
        options = launch_options(logits.shape[1], width - 1)
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            verify_chain_kernel[(batch,)](**arguments, **options)
    return outputs
