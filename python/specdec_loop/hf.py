"""Speculation inside `model.generate(ids, custom_generate=specdec_loop.hf.custom_generate, drafter=...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
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

from specdec_kernels import SamplingParams

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
