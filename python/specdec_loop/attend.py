"""How a Hugging Face model attends here: a registered attention function and a cache that is written in place.

Nothing is patched and no [q, kv] mask exists. The model runs on packed tokens of shape [1, N]; one `Step` says where
each of them stands. It reaches the cache as an attribute and the attention function as a keyword of the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec_kernels import DraftTree, tree_attention

NAME = "specdec"
# Chains of one word of ancestor bits, where a prefill needs what SDPA does not have (window, softcap, sinks).
_CHUNK = 64


class Step(NamedTuple):
    """Where the N packed tokens of one forward stand."""

    rows: Tensor  # [N] int64, cache row
    slots: Tensor  # [N] int64, slot within the row
    tree: DraftTree | None  # what each token sees besides its prefix; None: the prefill of one request
    prefix_lens: Tensor | None  # [B] int32, committed slots; rows 0..B-1 of the cache are in use
    nodes: Tensor | None = None  # [N] int64, places of the tokens in the packed tree; None: it is run as a whole


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, Hkv, length, D], allocated at the first write and never again."""

    is_sliding = False

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.rows, self.length = rows, length
        self.step: Step | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of the first states."""
        # Zeros, because a kernel may multiply what stands in a slot that nobody sees by a weight of zero.
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [1, Hkv, N, D] at the step's slots; return the whole buffers, in a prefill the states themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step
        self.keys[step.rows, :, step.slots] = key_states[0].transpose(0, 1)
        self.values[step.rows, :, step.slots] = value_states[0].transpose(0, 1)
        return (key_states, value_states) if step.tree is None else (self.keys, self.values)

    def get_seq_length(self) -> int:
        """0: rows differ in length, and positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked for by mask builders only, and this attention has none."""
        return self.length, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.length

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


class SlotCache(Cache):
    """A cache of some requests with `length` slots each, dense, for any mix of lengths.

    What stands above a row's entry of `last_positions` [rows] int64 gives no token that is kept. Drafts there are run
    at that position, so that speculation never reads past a table of positions that plain decoding stays within.
    """

    def __init__(self, length: int, last_positions: Tensor):
        super().__init__(layers=[])
        self.rows, self.length, self.last_positions = len(last_positions), length, last_positions
        self.step: Step | None = None

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """See SlotLayer.update."""
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self.rows, self.length))
        self.layers[layer_idx].step = self.step
        return self.layers[layer_idx].update(key_states, value_states)

    def buffers(self, rows: int) -> list[Tensor]:
        """Keys and values of all layers, the first `rows` rows of each: views."""
        return [buffer[:rows] for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` slots of one row to another, which keeps the rows in use dense."""
        for buffer in self.buffers(self.rows):
            buffer[destination, :, :length] = buffer[source, :, :length]
        self.last_positions[destination] = self.last_positions[source]


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
        query: [1, Hq, N, D], the packed tokens.
        key, value: what `SlotLayer.update` returned.
        step: where the tokens stand.
        sliding_window, softcap, s_aux: what the layer asks for (Mistral, Gemma 2, GPT-OSS).

    Raises:
        ValueError: the step did not arrive, or the layer asks for something that is not served.
    """
    owner = type(module).__name__
    if step is None:
        raise ValueError(f"step: expected a Step, got None; {owner} did not pass it on, or ran outside specdec_loop")
    if attention_mask is not None or position_bias is not None:
        raise ValueError(f"{owner}: expected no attention mask and no position bias; this attention does not add them")
    window = sliding_window
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    if window is None and layer_types and layer_types[module.layer_idx] == "sliding_attention":
        raise ValueError(f"sliding_window: layer {module.layer_idx} of {owner} is a sliding one, got None")
    options = {"scale": scaling, "window": window, "softcap": softcap, "sinks": s_aux}
    if step.tree is None:
        return _prefill(query, key, value, options)[None], None
    rows = step.prefix_lens.shape[0]
    packed = query[0].transpose(0, 1)
    if step.nodes is not None:
        # The op takes a row for each node of a tree; earlier nodes have their keys in the cache and need no output.
        packed = packed.new_zeros(step.tree.tokens.shape[0], *packed.shape[1:]).index_copy_(0, step.nodes, packed)
    out = tree_attention(packed, key[:rows], value[:rows], step.tree, step.prefix_lens, **options)
    return (out if step.nodes is None else out[step.nodes])[None], None


def _prefill(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    """[N, Hq, Dv]: causal attention of one request's prompt, whose keys are all at hand."""
    length = query.shape[2]
    window = options["window"]
    if options["softcap"] is None and options["sinks"] is None and (window is None or window >= length):
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options["scale"], enable_gqa=grouped
        )
        return out[0].transpose(0, 1)
    packed = query[0].transpose(0, 1)
    pieces = []
    for start in range(0, length, _CHUNK):
        piece = packed[start : start + _CHUNK]
        chain = DraftTree.chain(torch.zeros(1, len(piece), dtype=torch.int32, device=query.device))
        prefix = torch.full((1,), start, dtype=torch.int32, device=query.device)
        pieces.append(tree_attention(piece, key, value, chain, prefix, **options))
    return torch.cat(pieces)


AttentionInterface.register(NAME, attention)


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
        **kwargs,
    )


def tree_step(tree: DraftTree, prefix_lens: Tensor, nodes: Tensor | None = None) -> tuple[Tensor, Step]:
    """Positions [N] and the step of a tree, or of some of its nodes, behind each request's prefix."""
    count = tree.tokens.shape[0]
    batch = torch.arange(tree.cu_nodes.shape[0] - 1, device=tree.tokens.device)
    rows = batch.repeat_interleave(tree.cu_nodes.diff(), output_size=count)
    starts = (prefix_lens - tree.cu_nodes[:-1])[rows]
    slots = starts + torch.arange(count, device=rows.device)
    positions = (prefix_lens[rows] + tree.depths()).long()
    if nodes is not None:
        rows, slots, positions = rows[nodes], slots[nodes], positions[nodes]
    return positions, Step(rows, slots, tree, prefix_lens, nodes)
