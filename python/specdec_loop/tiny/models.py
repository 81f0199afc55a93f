"""The shapes of the pair and how they start."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .tokenizer import EOS_ID, VOCAB_SIZE


def make_model(hidden: int, layers: int, heads: int, intermediate: int, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings whose residual branches start small."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= (2 * layers) ** 0.5
    return model


def make_target(seed: int = 0) -> LlamaForCausalLM:
    """7.5 M parameters, of which 6.1 M are the embedding."""
    return make_model(hidden=192, layers=3, heads=3, intermediate=512, seed=seed)


def make_drafter(target: LlamaForCausalLM, layers: int, seed: int = 1) -> LlamaForCausalLM:
    """2.2 M parameters with two layers; its embedding starts as the principal components of the target's."""
    model = make_model(hidden=64, layers=layers, heads=2, intermediate=256, seed=seed)
    table = target.get_input_embeddings().weight.detach().float()
    _, vectors = torch.linalg.eigh(table.T @ table)
    model.get_input_embeddings().weight.data.copy_(table @ vectors[:, -64:])
    return model
