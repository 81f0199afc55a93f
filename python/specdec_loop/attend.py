"""How a Hugging Face model attends here: a registered attention function, with which every forward does without a mask.

Nothing is patched and no [q, kv] mask exists. A forward over draft trees is told where its tokens stand by a `Step`,
which reaches the cache as an attribute and the attention function as a keyword of the forward. A forward without one
is plain causal decoding, as `model.generate` does it; what its mask would say reaches the attention in a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from specdec_kernels import DraftTree, TreeLayout, compact_kv_, tree_attention
from specdec_kernels.trees import tree_layout

from .caches import SlotCache, SlotLayer, Step, tree_step

__all__ = ["NAME", "SlotCache", "SlotLayer", "Step", "attending", "attention", "forward", "prefill", "tree_step"]

NAME = "specdec"
# Chains of one word of ancestor bits, where causal attention needs what SDPA does not have (window, softcap, sinks).
_CHUNK = 64


def attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    step: Step | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The function that is registered as "specdec".

    Args:
        module: the model's attention layer.
        query: [B, Hq, q, D]; of a step on a `SlotCache` [1, Hq, N, D], the packed tokens.
        key, value: what the cache's `update` returned.
        attention_mask: what `causal` made of the mask; not looked at beside a step.
        step: where the tokens stand; None: plain causal attention.
        sliding_window, softcap, s_aux: what the layer asks for (Mistral, Gemma 2, GPT-OSS).

    Raises:
        ValueError: neither a step nor a mask of `causal` arrived, or the layer asks for something that is not served.
    """
    owner = type(module).__name__
    if position_bias is not None or (attention_mask is not None and attention_mask.dtype != torch.int32):
        raise ValueError(f"{owner}: expected no mask but the one that is built for {NAME!r}, and no position bias")
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    if sliding_window is None and layer_types and layer_types[module.layer_idx] == "sliding_attention":
        raise ValueError(f"sliding_window: layer {module.layer_idx} of {owner} is a sliding one, got None")
    options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    if step is None:
        if attention_mask is None:
            raise ValueError(f"step: expected a Step or a mask for {NAME!r}, got neither from {owner}")
        return _plain(query, key, value, attention_mask, options), None
    if step.tree is None:
        return _from_scratch(query, key, value, options), None
    if step.rows is None:
        return _padded(query, key, value, step, options), None
    rows = step.prefix_lens.shape[0]
    packed = query[0].transpose(0, 1)
    if step.nodes is not None:
        # The op takes a row for each node of a tree; earlier nodes have their keys in the cache and need no output.
        packed = packed.new_zeros(step.tree.tokens.shape[0], *packed.shape[1:]).index_copy_(0, step.nodes, packed)
    out = tree_attention(packed, key[:rows], value[:rows], step.tree, step.prefix_lens, layout=step.layout, **options)
    return (out if step.nodes is None else out[step.nodes])[None], None


def _padded(query: Tensor, key: Tensor, value: Tensor, step: Step, options: dict) -> Tensor:
    """[B, q, Hq, Dv]: trees whose keys a cache of transformers has appended at one slot for all requests."""
    tokens = query.transpose(1, 2).flatten(0, 1)
    if step.moves is not None:
        # Slot `prefix + j` belongs to node j. As a path that ends at the tree, it hangs on the slot before the prefix's
        # end, which stays.
        compact_kv_([key, value], step.moves, step.prefix_lens - 1)
    packed = tokens if step.packed is None else tokens[step.packed]
    out = tree_attention(packed, key, value, step.tree, step.prefix_lens, layout=step.layout, **options)
    if step.packed is not None:
        out = out.new_zeros(len(tokens), *out.shape[1:]).index_copy_(0, step.packed, out)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _plain(query: Tensor, key: Tensor, value: Tensor, where: Tensor, options: dict) -> Tensor:
    """[B, q, Hq, Dv]: each token sees itself and what came before it; `where` is of `causal`."""
    batch, _, length, _ = query.shape
    known = where.shape[-1]
    if known == 0:
        return _from_scratch(query, key[:, :, :length], value[:, :, :length], options)
    if known == 1 and length <= _CHUNK:
        tree, layout = _chains(batch, length, query.device)
        packed = query.transpose(1, 2).flatten(0, 1)
        out = tree_attention(packed, key, value, tree, where[:, 0, 0, 0], layout=layout, **options)
        return out.unflatten(0, (batch, length))
    if known == 1:
        rows = [_chunked(*part, options) for part in zip(query, key, value, where[:, 0, 0, 0], strict=True)]
        return torch.stack(rows)
    # Padding on the left, so each request's slots begin elsewhere.
    out = query.new_zeros(batch, length, query.shape[1], value.shape[-1])
    for b, (prefix, start) in enumerate(where[:, 0, 0].tolist()):
        first = max(start - prefix, 0)  # tokens before it are padding
        if first == length:
            continue
        keys, values = (states[b : b + 1, :, start : prefix + length] for states in (key, value))
        tokens = query[b : b + 1, :, first:]
        if prefix <= start:
            out[b, first:] = _from_scratch(tokens, keys, values, options)[0]
        else:
            out[b] = _chunked(tokens[0], keys[0], values[0], prefix - start, options)
    return out


def _from_scratch(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    """[B, n, Hq, Dv]: causal attention of prompts whose keys are all at hand, [B, Hkv, n, D]."""
    length, window = query.shape[2], options["window"]
    if options["softcap"] is None and options["sinks"] is None and (window is None or window >= length):
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=options["scale"], enable_gqa=grouped
        )
        return out.transpose(1, 2)
    return torch.stack([_chunked(*part, 0, options) for part in zip(query, key, value, strict=True)])


def _chunked(query: Tensor, key: Tensor, value: Tensor, prefix: int | Tensor, options: dict) -> Tensor:
    """[n, Hq, Dv] of one request: chains of tokens [Hq, n, D] behind `prefix` slots, as if each were a request.

    All of them read the same cache row, so one call serves them, and no chain computes much that it does not see.
    """
    tree, layout, starts = _chunks(query.shape[1], query.device)
    keys, values = (states.expand(len(starts), *states.shape) for states in (key, value))
    return tree_attention(query.transpose(0, 1), keys, values, tree, starts + prefix, layout=layout, **options)


# The layers of a forward ask for the same, and so do the forwards of plain decoding.
@lru_cache(maxsize=8)
def _chains(batch: int, length: int, device: torch.device) -> tuple[DraftTree, TreeLayout]:
    tree = DraftTree.chain(torch.zeros(batch, length, dtype=torch.int32, device=device))
    return tree, tree_layout(tree)


@lru_cache(maxsize=8)
def _chunks(length: int, device: torch.device) -> tuple[DraftTree, TreeLayout, Tensor]:
    """One chain cut into pieces, and where they start [pieces] int32."""
    starts = list(range(0, length, _CHUNK))
    sizes = [min(_CHUNK, length - start) for start in starts]
    tokens = torch.zeros(len(starts), min(_CHUNK, length), dtype=torch.int32, device=device)
    tree = DraftTree.chain(tokens, sizes)
    return tree, tree_layout(tree), torch.tensor(starts, dtype=torch.int32, device=device)


def causal(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config=None,
    device=None,
    **kwargs,
) -> Tensor:
    """What transformers builds instead of a [q, kv] mask: numbers of each request, [B, 1, 1, 0..2] int32.

    No numbers: nothing is in the cache. One: slots in front of the tokens, counted in what this layer keeps. Two: also
    how many slots at the beginning are padding (on a GPU they are read back once for every layer).

    Raises:
        ValueError: attention that is not causal, full or sliding, or padding that is not on the left of all tokens.
    """
    unserved = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    # Whoever changes what is causal (packed sequences, image tokens) forbids the skip.
    changed = use_vmap or "allow_is_bidirectional_skip" in kwargs or (q_length > 1 and not allow_is_causal_skip)
    if unserved or changed:
        raise ValueError(f"{NAME!r} attention: expected plain causal attention over full or sliding layers")
    fresh = not isinstance(q_offset, Tensor) and q_offset == 0
    padding = None if attention_mask is None else _padding(attention_mask, fresh)
    if fresh and padding is None:
        return torch.empty(batch_size, 1, 1, 0, dtype=torch.int32, device=device)
    # A new tensor: the cache counts on in the one that it gave.
    prefix = torch.zeros(batch_size, dtype=torch.int32, device=device) + (q_offset - kv_offset)
    numbers = [prefix] if padding is None else [prefix, (padding.to(torch.int32) - kv_offset).clamp(min=0)]
    return torch.stack(numbers, 1)[:, None, None]


def _padding(mask: Tensor, fresh: bool) -> Tensor | None:
    """[B] padding in front of each request, None if there is none; behind a first forward's tokens it is harmless."""
    mask = mask.bool()
    if bool(mask.all()):
        return None
    starts = mask.int().argmax(1)
    ends = mask.shape[1] - mask.flip(1).int().argmax(1)
    gaps = ends - starts != mask.sum(1)
    if not fresh:
        gaps = gaps | (ends != mask.shape[1])
    if bool(gaps.any()):
        raise ValueError(f"attention_mask: expected one run of ones up to the last token, got {mask.int().tolist()}")
    return starts


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, causal)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use this attention inside the block; its own implementation comes back at the end.

    Raises:
        ValueError: the model's class does not go through AttentionInterface or takes no positions, or it has layers
            that are not attention over a cache of keys (recurrent, chunked, encoder-decoder).
    """
    name, config = type(model).__name__, model.config
    text = config.get_text_config()
    unserved = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unserved or config.is_encoder_decoder:
        kind = f"layers {sorted(unserved)}" if unserved else "an encoder and a decoder"
        raise ValueError(f"{name}: expected a decoder of full and sliding attention layers, got {kind}")
    if "position_ids" not in signature(model.forward).parameters:
        raise ValueError(f"{name}: expected a forward that takes position_ids")
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    before = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        if text._attn_implementation != NAME:
            raise ValueError(f"{name}: expected attention that goes through AttentionInterface")
        yield
    finally:
        model.set_attn_implementation(before)


def prefill(model: PreTrainedModel, cache: SlotCache, prompts: list[Tensor], **kwargs) -> None:
    """Fill row b of the cache with all but the last token of prompt b, which is the first root.

    One request at a time: prompts differ in length, and each is work enough for the machine.
    """
    for row, prompt in enumerate(prompts):
        slots = torch.arange(len(prompt) - 1, device=prompt.device)
        if len(slots):
            forward(model, cache, prompt[:-1], slots, Step(torch.full_like(slots, row), slots, None, None), **kwargs)


def forward(model, cache: SlotCache, tokens: Tensor, positions: Tensor, step: Step, **kwargs):
    """One forward of N packed tokens; [N] tokens and positions. `model` may be a causal LM or its body."""
    cache.step = step
    # A token of -1 is no draft: verification passes over it, so what stands in its place does not matter.
    return model(
        input_ids=tokens.clamp(min=0)[None],
        position_ids=torch.minimum(positions, cache.last_positions[step.rows])[None],
        past_key_values=cache,
        use_cache=True,
        step=step,
        attention_mask=no_mask(tokens.device),
        **kwargs,
    )


@lru_cache(maxsize=8)
def no_mask(device: torch.device) -> Tensor:
    """What is passed as a mask beside a step, so that none is built: four dimensions count as built already."""
    return torch.empty(1, 1, 1, 0, dtype=torch.int32, device=device)
