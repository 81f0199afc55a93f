"""Text written by the target: what the drafter imitates and what the vocabulary order is counted on.

Counts over the target's own text fit a trimmed head better than counts over a corpus (VocabTrim, arXiv 2506.22694).
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

from .tokenizer import EOS_ID, VOCAB_SIZE


@torch.inference_mode()
def continue_text(
    model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, temperature: float, seed: int = 0
) -> Tensor:
    """[B, P + new_tokens] int64: `prompts` [B, P] int64 and what the model goes on with, past any EOS; 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    text, step = prompts, prompts
    for _ in range(new_tokens):
        logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            step = logits.argmax(dim=-1, keepdim=True)
        else:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat([text, step], dim=1)
    return text


def generate_corpus(
    model: LlamaForCausalLM, tokens: np.ndarray, rows: int, prompt: int, new_tokens: int, batch: int, seed: int
) -> np.ndarray:
    """[rows, prompt + new_tokens] uint16: random passages of `tokens` [T] uint16 and what the target goes on with.

    Every third batch is sampled at T=1, the rest greedy.
    """
    rng = np.random.default_rng(seed)
    pieces = []
    bar = tqdm(total=rows * new_tokens, desc="target writes", unit="tok", unit_scale=True)
    for first in range(0, rows, batch):
        starts = rng.integers(0, len(tokens) - prompt, size=min(batch, rows - first))
        prompts = torch.from_numpy(np.stack([tokens[start : start + prompt] for start in starts]).astype(np.int64))
        temperature = 1.0 if first // batch % 3 == 2 else 0.0
        text = continue_text(model, prompts, new_tokens, temperature, seed + first)
        pieces.append(text.numpy().astype(np.uint16))
        bar.update(len(starts) * new_tokens)
    bar.close()
    return np.concatenate(pieces)


def vocabulary_order(generated: np.ndarray, corpus: np.ndarray, weight: float = 0.02) -> Tensor:
    """[V] int32: all ids, the most frequent first, EOS before all.

    generated: [R, L] uint16, text of the target; corpus: [T] uint16, which counts `weight` as much per token: it orders
    what the target happened not to write.
    """
    counts = np.bincount(generated.ravel(), minlength=VOCAB_SIZE) + weight * np.bincount(corpus, minlength=VOCAB_SIZE)
    counts[EOS_ID] = np.inf
    return torch.from_numpy(np.argsort(-counts, kind="stable").astype(np.int32))
