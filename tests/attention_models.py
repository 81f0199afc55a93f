"""Small random models with the kinds of attention there are: windows, caps, sinks, norms, one or many KV heads."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loop_support import llama
from specdec_kernels import DraftTree

VOCABULARY, WINDOW = 61, 7
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def gemma2():
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(attn_implementation="eager", **caps, **MIXED, **SIZES))


def gemma3():
    sizes = SIZES | {"num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(query_pre_attn_scalar=8, **MIXED, **sizes))


def gpt_oss():
    config = GptOssConfig(num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager", **MIXED, **SIZES)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


MODELS = {
    "llama": lambda: llama(2, vocab=VOCABULARY),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **SIZES)),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
}


def make(name: str):
    torch.manual_seed(5)
    return MODELS[name]().eval()


def path_to(tree: DraftTree, node: int) -> tuple[int, list[int], list[int]]:
    """The request of a packed node; on the way from its root to it, the local nodes and the tokens below the root."""
    request = int(torch.searchsorted(tree.cu_nodes, node, right=True)) - 1
    start = int(tree.cu_nodes[request])
    nodes = [node - start]
    while nodes[-1] > 0:
        nodes.append(int(tree.parents[start + nodes[-1]]))
    nodes.reverse()
    return request, nodes, tree.tokens[torch.tensor(nodes[1:], dtype=torch.int64) + start].tolist()


def assert_path_logits(model, prompts: list[torch.Tensor], tree: DraftTree, logits: torch.Tensor) -> None:
    """Row for row what the model's own attention gives for the prompt and the path alone, without a cache."""
    tolerance = 1e-5 * float(logits.abs().max().clamp(min=1))
    for node in range(tree.tokens.shape[0]):
        request, _, tokens = path_to(tree, node)
        ids = torch.tensor([prompts[request].tolist() + tokens])
        expected = model(ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[node], expected, atol=tolerance, rtol=0)
