"""Speculation with what transformers has: inside `model.generate`, and draft trees on its own caches.

`model.generate(ids, custom_generate=specdec_loop.hf.custom_generate, drafter=...)` runs the loop. For loops of your own
`tree_logits` and `commit_path` run trees and commit paths on a DynamicCache or a StaticCache that any forward filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_kernels import DraftTree, SamplingParams, TreeLayout, compact_kv_
from specdec_kernels.trees import tree_layout

from . import attend
from .drafters import Drafter, Tree
from .generate import generate
from .statistics import Statistics

# In the order in which verification applies them, each with the parameter it stands for.
_WARPERS = (
    (TemperatureLogitsWarper, "temperature"),
    (TopKLogitsWarper, "top_k"),
    (TopPLogitsWarper, "top_p"),
    (MinPLogitsWarper, "min_p"),
)
# What `generate` hands on that needs nothing done here.
_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | PreTrainedModel | None = None,
    draft_length: int = 4,
    tree: Tree | None = None,
    method: str | None = None,
    seeds: int | Sequence[int] | None = None,
    token_callback: Callable[[int, list[int]], None] | None = None,
    statistics: Statistics | None = None,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The decoding method for `generate(custom_generate=...)`; do not call it yourself.

    The generation config is honoured: do_sample, temperature, top_k (whose default is 50), top_p, min_p, max_length,
    max_new_tokens, end and padding ids, num_return_sequences, and stopping criteria. Left-padded batches are allowed.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from `generate`.
        drafter, draft_length, tree, method, seeds, token_callback: see `specdec_loop.generate`; None for `drafter`
            decodes without drafts.
        statistics: this call's counts and times are added to it.

    Returns:
        [B, n] int64 as `generate` returns it, or with `return_dict_in_generate` an output that holds it.

    Raises:
        ValueError: beams, a logits processor that verification does not know, scores, or model inputs besides ids.
    """
    beams = generation_config.num_beams or 1
    if beams != 1:
        raise ValueError(f"num_beams: expected 1 with custom_generate, got {beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, None):
            raise ValueError(f"{name}: expected False with custom_generate, got True")
    given = sorted(name for name, value in model_kwargs.items() if name not in _HANDLED and value is not None)
    if given:
        raise ValueError(f"{', '.join(given)}: expected no model inputs besides input_ids and attention_mask")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"past_key_values: expected none, got a cache of {cache.get_seq_length()} tokens")

    params = sampling_params(logits_processor, bool(generation_config.do_sample))
    eos = {i for each in stopping_criteria if isinstance(each, EosTokenCriteria) for i in each.eos_token_id.tolist()}
    pad = getattr(generation_config, "_pad_token_tensor", None)
    # The loop ends requests at these itself.
    own = [each for each in stopping_criteria if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria))]
    longest = [each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
    room = min([generation_config.max_length, *longest]) - input_ids.shape[1]
    result = generate(
        model,
        drafter,
        input_ids,
        attention_mask=model_kwargs.get("attention_mask"),
        max_new_tokens=max(room, 0),
        draft_length=draft_length,
        tree=tree,
        method=method,
        params=params,
        seeds=seeds,
        eos_token_id=sorted(eos),
        pad_token_id=None if pad is None else int(pad),
        stopping_criteria=own,
        token_callback=token_callback,
    )
    if statistics is not None:
        statistics.add(result.statistics)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=result.sequences)
    return result.sequences


def sampling_params(processors: Sequence, do_sample: bool) -> SamplingParams:
    """What a list of logits processors does, as parameters of verification.

    Raises:
        ValueError: a processor that is not temperature, top_k, top_p or min_p, or one that stands in another order.
    """
    found: dict[str, float] = {}
    last = -1
    for processor in processors:
        names = [name for kind, name in _WARPERS if type(processor) is kind]
        if not names:
            raise ValueError(f"logits_processor: {type(processor).__name__} is not supported by custom_generate")
        place = [name for _, name in _WARPERS].index(names[0])
        if place <= last:
            order = ", ".join(name for _, name in _WARPERS)
            raise ValueError(f"logits_processor: expected each of {order} once and in this order, got {names[0]} late")
        last = place
        if getattr(processor, "min_tokens_to_keep", 1) > 1:
            raise ValueError(f"min_tokens_to_keep: expected 1 in {names[0]}, got {processor.min_tokens_to_keep}")
        found[names[0]] = getattr(processor, names[0])
    if not do_sample:
        return SamplingParams(temperature=0.0)
    return SamplingParams(**found)


def static_cache(model: PreTrainedModel, length: int) -> Cache:
    """A static cache of `length` slots that draft trees can use: its sliding layers, too, keep every slot."""
    return Cache(layers=[StaticLayer(length) for _ in range(model.config.get_text_config().num_hidden_layers)])


def tree_logits(
    model: PreTrainedModel,
    cache: Cache,
    tree: DraftTree,
    prefix_lens: Tensor,
    *,
    layout: TreeLayout | None = None,
    **kwargs,
) -> Tensor:
    """Run draft trees on a cache of transformers: one forward of [B, max_nodes] tokens, written behind the cache's end.

    The model has to run with this attention (`model.set_attn_implementation("specdec")` or `attend.attending(model)`).

    Args:
        model: a causal LM.
        cache: `DynamicCache()`, which keeps all slots, `static_cache(...)`, or a StaticCache of a model without sliding
            layers. It ends where the longest prefix does; between a shorter prefix and that end nothing is seen.
        tree: the trees; max_nodes is the exact size of the largest.
        prefix_lens: [B] int32, slots of each request that are committed, its prompt without the root.
        layout: of a graph instead of the tree's own, made with these prefix_lens.
        kwargs: further arguments of the forward.

    Returns:
        [N, V] logits of the packed nodes. The trees' keys stand behind their prefixes: see `commit_path`.

    Raises:
        ValueError: a cache with layers that do not keep every slot.
    """
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                f"cache: expected layers that keep every slot (DynamicCache() without a config, or static_cache), got "
                f"{type(layer).__name__}"
            )
    batch, width, count = prefix_lens.shape[0], tree.max_nodes, tree.tokens.shape[0]
    layout = tree_layout(tree, prefix_lens) if layout is None else layout
    tokens, positions, packed = tree.tokens.clamp(min=0).long(), layout.positions.long(), None
    if count != batch * width:
        starts = torch.arange(batch, device=tokens.device) * width - tree.cu_nodes[:-1]
        packed = torch.arange(count, device=tokens.device) + starts.repeat_interleave(
            tree.cu_nodes.diff(), output_size=count
        )
        tokens, positions = (x.new_zeros(batch * width).index_copy_(0, packed, x) for x in (tokens, positions))
    moves = None
    if batch > 1:
        # As paths that begin one slot before the prefix ends: there the root's neighbour in front stands, as node 0.
        gaps = (cache.get_seq_length() - prefix_lens)[:, None]
        steps = torch.arange(1, width + 1, dtype=torch.int32, device=tokens.device)
        moves = torch.cat([torch.zeros_like(gaps), gaps + steps], 1)
    step = attend.Step(None, None, tree, prefix_lens, None, layout, packed, moves)
    logits = model(
        input_ids=tokens.view(batch, width),
        position_ids=positions.view(batch, width),
        past_key_values=cache,
        use_cache=True,
        attention_mask=attend.no_mask(tokens.device),
        step=step,
        **kwargs,
    ).logits.flatten(0, 1)
    return logits if packed is None else logits[packed]


def commit_path(cache: Cache, nodes: Tensor, prefix_lens: Tensor, *, backend: str | None = None) -> Tensor:
    """Keep each request's accepted path in a cache that `tree_logits` has written, and cut off the rest, in place.

    Args:
        cache: the cache.
        nodes: [B, P] int32, `Verified.nodes`.
        prefix_lens: [B] int32, those of `tree_logits`.
        backend: force a backend of `compact_kv_`.

    Returns:
        [B] int32, committed slots of each request. The cache ends at the largest, which a DynamicCache has to be told
        as a number: on a GPU that waits for it.
    """
    layers = [layer for layer in cache.layers if layer.is_initialized]
    compact_kv_([x for layer in layers for x in (layer.keys, layer.values)], nodes, prefix_lens, backend=backend)
    after = prefix_lens + (nodes >= 0).sum(1, dtype=torch.int32)
    if layers and isinstance(layers[0], StaticLayer):
        end = after.max()
        for layer in layers:
            layer.cumulative_length.copy_(end)
    elif layers:
        cache.crop(int(after.max()) - cache.get_seq_length())
    return after
