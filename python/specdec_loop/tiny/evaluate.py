"""What the pair is worth: losses, agreement, coverage of trimmed heads, tokens per target call."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .corpus import heldout_stdlib
from .generated import continue_text
from .pair import Pair
from .prompts import heldout_prompts

TRIMMED_SIZES = (2048, 4096, 8192, 16384)


class Agreement(NamedTuple):
    """Averages over held-out positions."""

    target_loss: float
    drafter_loss: float
    overlap: float  # 1 - TV of the two distributions at T=1
    argmax: float  # how often both have the same best token
    top4: float  # how often the target's best token is among the drafter's best four
    text_coverage: dict[int, float]  # share of the text's tokens among the first so many of the vocabulary order
    argmax_coverage: dict[int, float]  # the same of the target's best tokens


@torch.inference_mode()
def agreement(pair: Pair, positions: int = 20_000, length: int = 512) -> Agreement:
    """Both models on held-out standard library text, about `positions` positions of it."""
    tokens = torch.cat(
        [torch.tensor(pair.tokenizer.backend_tokenizer.encode(file.text).ids) for file in heldout_stdlib()]
    )
    windows = tokens.unfold(0, length + 1, length)
    windows = windows[:: max(1, len(windows) * length // positions)]
    rank = torch.empty_like(pair.vocab_order, dtype=torch.int64)
    rank[pair.vocab_order.long()] = torch.arange(len(rank))
    sums = torch.zeros(5, dtype=torch.float64)
    text_ranks, best_ranks = [], []
    for window in tqdm(windows, desc="held-out text", unit="window"):
        labels = window[1:]
        log_p, log_q = (model(window[None, :-1]).logits[0].float().log_softmax(-1) for model in pair[:2])
        best = log_p.argmax(-1)
        top4 = log_q.topk(4, dim=-1).indices
        sums += torch.stack(
            [
                -log_p.gather(1, labels[:, None]).sum(),
                -log_q.gather(1, labels[:, None]).sum(),
                torch.minimum(log_p.exp(), log_q.exp()).sum(),
                (top4[:, 0] == best).sum(),
                (top4 == best[:, None]).any(1).sum(),
            ]
        )
        text_ranks.append(rank[labels])
        best_ranks.append(rank[best])
    text, best = torch.cat(text_ranks), torch.cat(best_ranks)
    coverage = [{size: (ranks < size).float().mean().item() for size in TRIMMED_SIZES} for ranks in (text, best)]
    return Agreement(*(sums / len(text)).tolist(), *coverage)


class TreeShape(NamedTuple):
    """How the drafter drafts: a beam search, of which the most probable nodes are kept."""

    depth: int
    beam: int
    nodes: int  # the root included


CHAIN = TreeShape(depth=4, beam=1, nodes=5)
TREE = TreeShape(depth=8, beam=8, nodes=32)


def heldout_texts(pair: Pair, prompts: int = 50, prompt_tokens: int = 128, new_tokens: int = 64) -> tuple[Tensor, int]:
    """[prompts, prompt_tokens + new_tokens] int64: held-out prompts, the target's greedy text; and `prompt_tokens`."""
    inputs = heldout_prompts(prompts, prompt_tokens, pair.tokenizer)
    return continue_text(pair.target, inputs, new_tokens, temperature=0), prompt_tokens


@torch.inference_mode()
def tokens_per_call(pair: Pair, texts: Tensor, start: int, shape: TreeShape, rows: int | None = None) -> float:
    """Replays greedy speculation: the target's own text decides what it would have accepted.

    texts: [B, L] int64, of which the tokens from `start` on are the target's.
    rows: the size of a trimmed draft head; None for the whole one.
    """
    ids = None if rows is None else pair.vocab_order[:rows].long().sort().values
    calls = 0
    label = f"tree of {shape.nodes}" if shape.beam > 1 else f"chain of {shape.depth}"
    for text in tqdm(texts, desc=label if rows is None else f"{label}, {rows} rows", unit="prompt"):
        at = start
        while at < len(text):
            at += 1 + longest_match(draft_tree(pair.drafter, text[:at], ids, shape), text[at:].tolist())
            calls += 1
    return texts[:, start:].numel() / calls


def longest_match(paths: set[tuple[int, ...]], text: list[int]) -> int:
    """How many tokens of `text` the tree of `paths` (every node by its path from the root) holds, all but the last."""
    matched = 0
    while matched < len(text) - 1 and tuple(text[: matched + 1]) in paths:
        matched += 1
    return matched


def draft_tree(drafter: PreTrainedModel, prefix: Tensor, rows: Tensor | None, shape: TreeShape) -> set[tuple[int, ...]]:
    """The nodes of a draft tree below `prefix` [P] int64, each as its path from the root.

    rows: [R] int64, the ids a trimmed head knows; None for all.
    """
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    found: dict[tuple[int, ...], float] = {}
    for _ in range(shape.depth):
        batch = torch.stack([torch.cat([prefix, torch.tensor(path, dtype=torch.int64)]) for path in frontier])
        logits = drafter(input_ids=batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        if rows is not None:
            logits = logits[:, rows]
        best = logits.log_softmax(-1).topk(shape.beam, dim=-1)
        ids = best.indices if rows is None else rows[best.indices]
        grown = {
            (*path, token): score + gain
            for (path, score), gains, tokens in zip(frontier.items(), best.values.tolist(), ids.tolist(), strict=True)
            for gain, token in zip(gains, tokens, strict=True)
        }
        found |= grown
        frontier = dict(sorted(grown.items(), key=lambda item: -item[1])[: shape.beam])
    return set(sorted(found, key=lambda path: -found[path])[: shape.nodes - 1])


def report(pair: Pair, prompts: int = 50) -> str:
    """A table of everything measured."""
    held = agreement(pair)
    texts, start = heldout_texts(pair, prompts)
    chain, tree, chain_trimmed, tree_trimmed = (
        tokens_per_call(pair, texts, start, shape, rows) for rows in (None, 8192) for shape in (CHAIN, TREE)
    )
    lines = [
        f"held-out loss, target / drafter         {held.target_loss:.3f} / {held.drafter_loss:.3f} nats per token",
        f"1 - TV at T=1                           {held.overlap:.3f}",
        f"argmax agreement                        {held.argmax:.3f}",
        f"target's argmax in the drafter's top 4  {held.top4:.3f}",
        "coverage of text (target's argmax)      "
        + ", ".join(
            f"{size}: {held.text_coverage[size]:.3f} ({held.argmax_coverage[size]:.3f})" for size in TRIMMED_SIZES
        ),
        f"tokens per target call, {prompts} prompts   chain K=4 {chain:.2f}, tree of 32 nodes {tree:.2f}",
        f"the same with 8192 rows                 {chain_trimmed:.2f}, {tree_trimmed:.2f}",
    ]
    return "\n".join(lines)
