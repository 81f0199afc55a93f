"""The recipe, stage by stage: corpus, tokenizer, target, generated text, drafter, vocabulary order, export.

A stage whose result lies in the output folder is not run again.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from .corpus import collect
from .distil import distillation_loss, mixed_batches
from .fit import Schedule, Windows, fit
from .generated import generate_corpus, vocabulary_order
from .models import make_drafter, make_target
from .sampled import UnigramSampler, sampled_cross_entropy
from .tokenizer import VOCAB_SIZE, encode_documents, load_tokenizer, train_tokenizer

NEGATIVES = 1024
# Of the text the target writes: long enough to leave the prompt behind, 256 tokens with it, one window of the drafter.
PROMPT_TOKENS, NEW_TOKENS = 64, 193


def text_stage(out: Path, corpus_bytes: int) -> np.ndarray:
    """The training tokens, [T] uint16; trains the tokenizer first."""
    if not (out / "train.npy").exists():
        train, heldout = collect(corpus_bytes)
        size = sum(len(file.text) for file in train)
        print(f"corpus: {len(train)} files, {size / 1e6:.1f} MB; {len(heldout)} files held out")
        tokenizer = train_tokenizer(file.text for file in train)
        tokenizer.save_pretrained(out / "tokenizer")
        np.save(out / "train.npy", encode_documents(tokenizer, [file.text for file in train], "tokenize"))
    return np.load(out / "train.npy")


def token_counts(tokens: np.ndarray) -> Tensor:
    """[V] fp32: how often each entry occurs in `tokens` [T] uint16."""
    return torch.from_numpy(np.bincount(tokens, minlength=VOCAB_SIZE)).float()


def target_stage(out: Path, tokens: np.ndarray, args: argparse.Namespace) -> LlamaForCausalLM:
    """The target, trained on `tokens` [T] uint16 with the sampled softmax."""
    if (out / "target" / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    model = make_target()
    schedule = Schedule(tokens=args.target_tokens, peak_lr=args.target_lr)
    sampler = UnigramSampler(token_counts(tokens), NEGATIVES, seed=2)
    windows = Windows(tokens, schedule.length, seed=3)
    body = torch.compile(model.model) if args.compile else model.model

    def loss_of(batch: Tensor) -> Tensor:
        candidates = sampler.draw(batch[:, 1:].flatten())
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            hidden = body(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
            return sampled_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, candidates)

    fit(model, loss_of, lambda step: windows.batch(step, schedule.batch), schedule, out / "target.pt", "target")
    model.save_pretrained(out / "target")
    return model


def generated_stage(out: Path, tokens: np.ndarray, target: LlamaForCausalLM, args: argparse.Namespace) -> np.ndarray:
    """[rows, L] uint16: text of the target."""
    if not (out / "generated.npy").exists():
        rows = args.generated_tokens // NEW_TOKENS
        text = generate_corpus(target, tokens, rows, PROMPT_TOKENS, NEW_TOKENS, batch=64, seed=4)
        np.save(out / "generated.npy", text)
    return np.load(out / "generated.npy")


def drafter_stage(
    out: Path, tokens: np.ndarray, generated: np.ndarray, target: LlamaForCausalLM, args: argparse.Namespace
) -> LlamaForCausalLM:
    """The drafter: first on the corpus, then mostly on the target's text, about which it will be asked."""
    if (out / "drafter" / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(out / "drafter", dtype=torch.float32)
    model = make_drafter(target, args.drafter_layers)
    for index, (budget, share, lr, hard) in enumerate(
        [(args.drafter_tokens, 0.0, 5e-3, 0.2), (args.finetune_tokens, 0.8, 2e-3, 0.5)]
    ):
        schedule = Schedule(tokens=budget, length=256, batch=8, peak_lr=lr)
        sampler = UnigramSampler(token_counts(tokens), NEGATIVES, seed=7 + index)
        loss_of = distillation_loss(target, model, sampler, hard, args.bf16, args.compile)
        batch_of = mixed_batches(tokens, generated, schedule, share)
        fit(model, loss_of, batch_of, schedule, out / f"drafter-{index}.pt", f"drafter, part {index + 1}")
    model.save_pretrained(out / "drafter")
    return model


def export_stage(out: Path, folder: Path) -> None:
    """Writes what is shipped to `folder`: both models in bf16, the tokenizer and the vocabulary order."""
    for name in ("target", "drafter"):
        LlamaForCausalLM.from_pretrained(out / name, dtype=torch.bfloat16).save_pretrained(folder / name)
    load_tokenizer(out / "tokenizer").save_pretrained(folder)
    order = vocabulary_order(np.load(out / "generated.npy")[:, PROMPT_TOKENS:], np.load(out / "train.npy"))
    save_file({"vocab_order": order}, folder / "vocab_order.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def train_pair(args: argparse.Namespace) -> None:
    """All stages in turn."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = text_stage(args.out, args.corpus_bytes)
    target = target_stage(args.out, tokens, args)
    generated = generated_stage(args.out, tokens, target, args)
    drafter_stage(args.out, tokens, generated, target, args)
    export_stage(args.out, args.export)
