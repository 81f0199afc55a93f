"""Text to count: files and strings, and what the target itself writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import SamplingParams

from ..drafters import Drafter
from ..generate import generate

# A tokenizer holds all tokens of a text at once, each with its text and place.
PIECE = 1 << 18


def read_pieces(texts: Iterable[str | Path], size: int = PIECE) -> Iterator[str]:
    """Strings as they are and the text of files (`Path`, UTF-8), in pieces of about `size` characters at most.

    Pieces end where lines do, as far as lines are shorter than that.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that is not UTF-8.
    """
    for text in texts:
        with text.open(encoding="utf-8") if isinstance(text, Path) else StringIO(text) as file:
            try:
                while piece := file.read(size):
                    yield piece + file.readline(size)
            except UnicodeDecodeError as error:
                raise ValueError(f"texts: expected UTF-8 in {text}, got {error}") from error


def encode_texts(tokenizer, texts: Iterable[str | Path], console: Console | None = None) -> list[Tensor]:
    """The tokens of strings and of files, without special tokens; a long text becomes several sequences.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: strings, and `Path`s of files in UTF-8.
        console: where a progress bar goes; None for none.

    Returns:
        [T] int32 sequences, none empty.
    """
    pieces = list(read_pieces(texts))
    shown = track(pieces, "tokenizing", console=console, disable=console is None)
    encoded = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in shown)
    return [torch.tensor(ids, dtype=torch.int32) for ids in encoded if ids]


def passages(sequences: Sequence[Tensor], length: int, count: int) -> list[Tensor]:
    """At most `count` windows of `length` tokens, evenly from all sequences and without overlap.

    Raises:
        ValueError: no sequence is that long.
    """
    windows = [window for sequence in sequences for window in sequence.long().split(length) if len(window) == length]
    if not windows:
        longest = max(map(len, sequences), default=0)
        raise ValueError(f"sequences: expected one of at least {length} tokens, got {longest} as the longest")
    taken = min(count, len(windows))
    return [windows[i * len(windows) // taken] for i in range(taken)]


def generate_texts(
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch: int = 8,
    seed: int = 0,
    drafter: Drafter | PreTrainedModel | None = None,
    draft_length: int = 4,
    console: Console | None = None,
) -> list[Tensor]:
    """What the target writes after each prompt: the text on which a trimmed vocabulary is best counted (VocabTrim).

    Args:
        target: a causal LM that `specdec_loop.generate` serves.
        prompts: [P] integer tensors of any lengths.
        max_new_tokens: tokens for each prompt, unless its text ends before.
        temperature: 0 is greedy; best the one at which the drafter will be used.
        batch: prompts that are decoded together; with a seed for each prompt it does not change what is drawn.
        seed: of the first prompt; the next ones count up from it.
        drafter: makes it faster and leaves the law of the text as it is.
        draft_length: drafts in a chain.
        console: where a progress bar goes; None for none.

    Returns:
        [n] int32 new tokens of each prompt, the end of text included where it came.
    """
    texts: list[Tensor] = []
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*bars, TimeElapsedColumn(), console=console, disable=console is None) as progress:
        task = progress.add_task("target writes", total=len(prompts) * max_new_tokens)
        for start in range(0, len(prompts), batch):
            part = [prompt.to(target.device) for prompt in prompts[start : start + batch]]
            result = generate(
                target,
                drafter,
                part,
                max_new_tokens=max_new_tokens,
                draft_length=draft_length,
                params=SamplingParams(temperature=temperature),
                seeds=list(range(seed + start, seed + start + len(part))),
                token_callback=lambda _, tokens: progress.advance(task, len(tokens)),
            )
            texts += [torch.tensor(tokens, dtype=torch.int32) for tokens in result.tokens]
            progress.update(task, completed=len(texts) * max_new_tokens)
    return texts


def split(sequences: Sequence[Tensor], every: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences to count on, and held-out ones: each `every`-th, or the ends of all where there are fewer than that.

    Raises:
        ValueError: `every` below 2, or so little text that one side is empty.
    """
    if every < 2:
        raise ValueError(f"every: expected >= 2, got {every}")
    if len(sequences) >= every:
        sides = [s for i, s in enumerate(sequences, 1) if i % every], list(sequences[every - 1 :: every])
    else:
        cuts = [len(sequence) - len(sequence) // every for sequence in sequences]
        sides = (
            [s[:cut] for s, cut in zip(sequences, cuts, strict=True)],
            [s[cut:] for s, cut in zip(sequences, cuts, strict=True)],
        )
    counted, held_out = ([sequence for sequence in side if len(sequence)] for side in sides)
    if not counted or not held_out:
        raise ValueError(f"sequences: expected {every} tokens or more in one of them, got {list(map(len, sequences))}")
    return counted, held_out
