"""A larger model that computes the same function, to measure speed at a real model's cost.

The small pair's acceptance is real, but at its size Python overhead hides what a method gains. The copy has zero
channels behind the real ones, heads and units whose output weights are zero, and layers that add nothing to the
residual stream.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def scale(model: LlamaForCausalLM, hidden: int, layers: int, intermediate: int | None = None) -> LlamaForCausalLM:
    """A copy of `model` with `hidden` channels and `layers` layers that returns the same logits.

    model: any Llama with its weights in place; head size, group size of grouped-query attention, biases, tied or untied
    embeddings, dtype and attention implementation are kept, the numbers of heads grow with `hidden`.
    intermediate: units of the MLP, by default as many as keep its ratio to the hidden size.
    """
    old = model.config
    if old.model_type != "llama":
        raise ValueError(f"model: got one of type {old.model_type!r}, expected 'llama'")
    if intermediate is None:
        intermediate = max(old.intermediate_size, round(old.intermediate_size * hidden / old.hidden_size / 64) * 64)
    for name, value, least in (
        ("hidden", hidden, old.hidden_size),
        ("layers", layers, old.num_hidden_layers),
        ("intermediate", intermediate, old.intermediate_size),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least the model's own {least}")

    group = old.num_attention_heads // old.num_key_value_heads
    config = copy.deepcopy(old)
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = hidden, layers, intermediate
    # The group size stays, so that query head i reads the key head it read before.
    config.num_key_value_heads = max(old.num_key_value_heads, hidden // (config.head_dim * group))
    config.num_attention_heads = group * config.num_key_value_heads
    # mean(x^2) over h of H channels is h/H of what it was: eps shrinks alike and the weights take up sqrt(h/H).
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / hidden
    gain = (old.hidden_size / hidden) ** 0.5

    # The constructor's random weights stay where zeros behind them cancel them: constant weights would be
    # unrealistically easy on memory and power.
    larger = LlamaForCausalLM._from_config(config, dtype=model.dtype).to(model.device).eval()
    larger.generation_config = copy.deepcopy(model.generation_config)
    with torch.no_grad():
        pad_(larger.get_input_embeddings().weight, model.get_input_embeddings().weight)
        if not config.tie_word_embeddings:
            pad_(larger.lm_head.weight, model.lm_head.weight)
        pad_(larger.model.norm.weight, model.model.norm.weight * gain)
        for index, layer in enumerate(larger.model.layers):
            source = model.model.layers[index] if index < old.num_hidden_layers else None
            pad_layer_(layer, source, gain)
    return larger


def pad_(parameter: Tensor, values: Tensor) -> None:
    """Writes `values` into the leading corner of `parameter` and zeros everywhere else."""
    parameter.zero_()
    parameter[tuple(slice(size) for size in values.shape)] = values


def pad_layer_(layer: nn.Module, source: nn.Module | None, gain: float) -> None:
    """Makes `layer` compute what `source` does, or add nothing where `source` is None."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        weight = getattr(layer, name).weight
        weight.fill_(gain)
        if source is not None:
            pad_(weight, getattr(source, name).weight * gain)
    for block, inputs, output in (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
        ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    ):
        for name in (*inputs, output):
            linear = getattr(getattr(layer, block), name)
            origin = None if source is None else getattr(getattr(source, block), name)
            if name == output:
                linear.weight.zero_()
            elif origin is not None:
                # Channels behind the real ones are zero, so only the rows of real heads and units must be exact.
                linear.weight[: origin.weight.shape[0]] = 0
            if linear.bias is not None:
                linear.bias.zero_()
            if origin is not None:
                linear.weight[: origin.weight.shape[0], : origin.weight.shape[1]] = origin.weight
                if linear.bias is not None:
                    linear.bias[: origin.bias.shape[0]] = origin.bias
