"""`python -m specdec_loop vocab choose`: count, measure this machine, choose the size, write the map and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import tiny
from ..compare import make_console
from ..drafters.head import Head
from ..packed import pack_linears_
from ..tiny import corpus
from . import show
from .choice import Choice, choose_size, run_coverage, size_grid
from .counts import Counts, count_tokens, load_counts, merge_counts, save_counts
from .identity import tokenizer_hash
from .latency import Latency, measure_head
from .maps import VocabMap, save_map
from .rows import forced_ids, frequency_order, select_rows
from .steps import Costs, loop_steps, measure_acceptance, measure_costs
from .text import encode_texts, generate_texts, passages, split

# Without a drafter nothing says how often its drafts are accepted; the table says that this was assumed.
ASSUMED_ACCEPTANCE = 0.75
# Text that the shipped pair's vocabulary is counted on, of files that it knows.
PAIR_BYTES = 2_000_000
PROMPTS, NEW_TOKENS = 8, 64
LOWEST = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vocab choose`."""
    actions = parser.add_subparsers(dest="action", required=True)
    choose = actions.add_parser("choose", help="choose the rows of a drafter's head from measured time and coverage")
    choose.add_argument("--model", help="folder of the target and its tokenizer; default: the shipped pair")
    choose.add_argument(
        "--drafter", help="folder of the model whose head is trimmed; default: the target's own (EAGLE)"
    )
    choose.add_argument("--text", type=Path, nargs="+", help="UTF-8 files to count; every fifth piece is held out")
    choose.add_argument("--heldout", type=Path, nargs="+", help="files to hold out instead")
    choose.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="count so many tokens by the target")
    choose.add_argument("--counts", type=Path, nargs="+", default=(), help="add saved counts")
    choose.add_argument("--save-counts", type=Path, help="write the counts there")
    choose.add_argument("--draft-length", type=int, default=4, help="drafts in a chain")
    choose.add_argument("--batch", type=int, default=1, help="requests that are decoded together")
    choose.add_argument("--temperature", type=float, default=0.0, help="of the decoding to come; 0 is greedy")
    choose.add_argument("--acceptance", type=float, help="of a draft with the whole vocabulary; default: measured")
    choose.add_argument("--target-ms", type=float, help="a target step over a draft; default: measured")
    choose.add_argument("--body-ms", type=float, help="a drafter step without its head; default: measured")
    choose.add_argument("--prompt-tokens", type=int, default=128, help="length behind which steps are measured")
    choose.add_argument("--step", type=int, default=64, help="sizes that are weighed are this far apart")
    choose.add_argument("--rounds", type=int, default=20, help="how often each size is timed")
    choose.add_argument("--seconds", type=float, default=30.0, help="time for each of the two measurements, about")
    choose.add_argument("--seed", type=int, default=0)
    choose.add_argument("--out", type=Path, help="write the map there, as safetensors")
    choose.add_argument("--picture", type=Path, help="write a picture there")
    choose.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    choose.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class Models(NamedTuple):
    """What is decoded with, and the head that is trimmed."""

    target: PreTrainedModel
    drafter: PreTrainedModel | None
    tokenizer: object
    head: Head


def run(arguments: argparse.Namespace, load: Callable) -> int:
    """Choose and write. `load(folder, arguments)` gives the model and tokenizer of a folder."""
    console = make_console()
    logging.disable_progress_bar()
    models = _models(arguments, load)
    counted, heldout = _texts(arguments, models.tokenizer, console)
    prompts = passages(heldout, arguments.prompt_tokens, PROMPTS)
    order, forced, heldout = _order(arguments, models, counted, heldout, console)
    runs = run_coverage(heldout, order, arguments.draft_length)
    lowest = max(len(forced), min(LOWEST, models.head.size))
    sizes = size_grid(models.head.size, lowest)
    acceptance, costs, latency, origin = _measure(arguments, models, prompts, order, sizes, console)
    choice = choose_size(runs, latency, costs, acceptance=acceptance, step=arguments.step)
    console.print(show.table(choice, latency.sizes, _title(arguments, models), origin))
    _write(arguments, models, choice, latency, order, forced, console)
    return 0


def _models(arguments: argparse.Namespace, load: Callable) -> Models:
    if arguments.model is None:
        if arguments.drafter is not None:
            raise ValueError(f"model: expected a folder beside --drafter {arguments.drafter}, got none")
        pair = tiny.load(getattr(torch, arguments.dtype))
        target, drafter, tokenizer = pair.target.to(arguments.device), pair.drafter.to(arguments.device), pair.tokenizer
        for model in (target, drafter):
            pack_linears_(model)
    else:
        target, tokenizer = load(arguments.model, arguments)
        drafter = None
        if arguments.drafter is not None:
            drafter, own = load(arguments.drafter, arguments)
            if tokenizer_hash(own) != tokenizer_hash(tokenizer):
                raise ValueError(
                    f"drafter: expected the tokenizer of {arguments.model}, got another in {arguments.drafter}"
                )
    return Models(target, drafter, tokenizer, Head(target if drafter is None else drafter, None))


def _texts(arguments: argparse.Namespace, tokenizer, console: Console) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences to count, and held-out ones."""
    if arguments.text is None:
        if arguments.model is not None:
            raise ValueError("text: expected at least one file, got none")
        known, unknown = corpus.collect(PAIR_BYTES)
        sides = ([file.text for file in files] for files in (known, unknown))
        counted, heldout = (encode_texts(tokenizer, texts, console) for texts in sides)
    else:
        counted, heldout = encode_texts(tokenizer, arguments.text, console), []
    if arguments.heldout is not None:
        heldout = encode_texts(tokenizer, arguments.heldout, console)
    return (counted, heldout) if heldout else split(counted)


def _order(
    arguments: argparse.Namespace, models: Models, counted: list[Tensor], heldout: list[Tensor], console: Console
) -> tuple[Tensor, tuple[int, ...], list[Tensor]]:
    """All ids, best first; the forced ones; and the held-out text, which is the target's own where that was counted."""
    size, own = models.head.size, tokenizer_hash(models.tokenizer)
    backoff = None
    if arguments.generate:
        backoff = count_tokens(counted, size)
        sides = ((counted, arguments.generate, 0), (heldout, -(-arguments.generate // 4), arguments.generate))
        counted, heldout = (
            generate_texts(
                models.target,
                passages(side, arguments.prompt_tokens, -(-tokens // NEW_TOKENS)),
                max_new_tokens=NEW_TOKENS,
                temperature=arguments.temperature,
                drafter=models.drafter,
                seed=arguments.seed + first,
                console=console,
            )
            for side, tokens, first in sides
        )
    saved = (load_counts(path, own, vocab_size=size) for path in arguments.counts)
    counts = merge_counts([Counts(count_tokens(counted, size), own), *saved])
    if arguments.save_counts is not None:
        save_counts(arguments.save_counts, counts)
    forced = forced_ids(models.tokenizer, models.target.generation_config, models.target.config, vocab_size=size)
    return frequency_order(counts.values, force=forced, backoff=backoff), forced, heldout


def _measure(
    arguments: argparse.Namespace, models: Models, prompts: list[Tensor], order: Tensor, sizes: list[int], console
) -> tuple[float, Costs, Latency, str]:
    """Acceptance, costs and latency, and a line that says where each comes from."""
    timing = {"rounds": arguments.rounds, "seconds": arguments.seconds, "console": console}
    head = models.head
    acceptance, known = arguments.acceptance, "given"
    if acceptance is None and models.drafter is not None:
        known = f"measured on {len(prompts)} held-out prompts"
        with console.status("measuring acceptance"):
            acceptance, _ = measure_acceptance(
                models.target,
                models.drafter,
                prompts,
                draft_length=arguments.draft_length,
                max_new_tokens=NEW_TOKENS,
                temperature=arguments.temperature,
                seed=arguments.seed,
            )
    elif acceptance is None:
        acceptance, known = ASSUMED_ACCEPTANCE, "assumed"
    shape = {"draft_length": arguments.draft_length, "batch": arguments.batch}
    with loop_steps(models.target, models.drafter, prompts[0], **shape) as steps:
        costs = measure_costs(steps, **timing)
        latency = measure_head(
            head.weight,
            order,
            sizes,
            bias=head.bias,
            scale=head.scale,
            batch=arguments.batch,
            temperature=arguments.temperature,
            between=steps.body,
            **timing,
        )
    origins = {"target": "measured", "body": "measured" if models.drafter is not None else "one layer of the target's"}
    for name in origins:
        if (given := getattr(arguments, f"{name}_ms")) is not None:
            costs, origins[name] = costs._replace(**{name: given / 1e3}), "given"
    line = (
        f"K = {arguments.draft_length}, batch {arguments.batch}; acceptance {acceptance:.3f} ({known}); target step "
        f"{costs.target * 1e3:.2f} ms ({origins['target']}), drafter without head {costs.body * 1e3:.2f} ms "
        f"({origins['body']}), plain decoding {costs.plain * 1e3:.2f} ms a token"
    )
    return acceptance, costs, latency, line


def _title(arguments: argparse.Namespace, models: Models) -> str:
    name = arguments.model or "the shipped pair"
    weight = models.head.weight
    kind = str(weight.dtype).removeprefix("torch.")
    where = f"{weight.device.type}, {torch.get_num_threads()} threads" if weight.device.type == "cpu" else "cuda"
    return f"Head of {name}, {list(weight.shape)} {kind}, {where}"


def _write(
    arguments: argparse.Namespace,
    models: Models,
    choice: Choice,
    latency: Latency,
    order: Tensor,
    forced: tuple[int, ...],
    console: Console,
) -> None:
    if arguments.out is not None:
        rows = select_rows(order, choice.size, force=forced)
        save_map(arguments.out, VocabMap(rows, models.head.size, tokenizer_hash(models.tokenizer), forced))
        console.print(f"Map: {arguments.out}, {choice.size} rows, {len(forced)} of them forced")
    if arguments.picture is not None:
        show.picture(choice, latency, arguments.picture, _title(arguments, models))
        console.print(f"Picture: {arguments.picture}")
