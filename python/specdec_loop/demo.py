"""`python -m specdec_loop demo`: the shipped pair decodes held-out source code in several ways, all to the same end.

Chains run with the drafter's whole head, with some of its rows and with all of them in int8.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from . import tiny
from .compare import PLAIN, Method, coloured, compare, differing, make_console, picture, table
from .drafters import ModelDrafter, NgramDrafter, Tree
from .packed import pack_linears_
from .vocab import select_rows

# Copies that compute what the small pair computes at a real model's cost: 185 M and 10 M parameters.
TARGET = {"hidden": 1024, "layers": 12}
DRAFTER = {"hidden": 256, "layers": 2}
ROWS = 8000
CONTEXT = 240  # characters of a prompt that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--seconds", type=float, default=150.0, help="decoding time of all methods together, about")
    parser.add_argument("--prompts", type=int, default=8, help="most held-out prompts")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--draft-length", type=int, default=4, help="drafts in a chain")
    parser.add_argument("--nodes", type=int, default=16, help="nodes of a tree, its root included")
    parser.add_argument("--unscaled", action="store_true", help="decode with the small pair itself")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit code is 1 if a greedy output differs from autoregressive decoding."""
    console = make_console()
    logging.disable_progress_bar()
    pair = tiny.load(torch.float32)
    target, drafter = pair.target, pair.drafter
    if not arguments.unscaled:
        with console.status("making larger copies that compute the same function"):
            target, drafter = tiny.scale(target, **TARGET), tiny.scale(drafter, **DRAFTER)
    for model in (target, drafter):
        pack_linears_(model)
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (target, drafter)]
    rows = select_rows(pair.vocab_order, ROWS, force=pair.tokenizer.all_special_ids)
    chain = {"draft_length": arguments.draft_length}
    tree = {"tree": Tree(nodes=arguments.nodes, depth=5, width=4)}
    methods = [
        Method(PLAIN, None, {}),
        Method(f"chain of {arguments.draft_length}", ModelDrafter(drafter), chain),
        Method(f"chain, {ROWS} rows", ModelDrafter(drafter, rows=rows), chain),
        Method("chain, int8 head", ModelDrafter(drafter, head="int8"), chain),
        Method(f"tree of {arguments.nodes}", ModelDrafter(drafter), tree),
        Method("n-gram, no model", NgramDrafter(min_match=2), chain),
    ]
    prompts = tiny.heldout_prompts(arguments.prompts, arguments.prompt_tokens, pair.tokenizer)
    console.print(
        f"Target {millions[0]:.0f} M parameters, drafter {millions[1]:.1f} M, fp32, {torch.get_num_threads()} threads; "
        f"held-out source code, greedy, {arguments.max_new_tokens} new tokens a prompt, one prompt at a time.\n"
    )
    outcomes = compare(
        target,
        methods,
        list(prompts),
        console,
        max_new_tokens=arguments.max_new_tokens,
        seconds=arguments.seconds / len(methods),
        eos_token_id=(),
    )
    console.print()
    console.print(table(outcomes, f"prompts decoded: {len(outcomes[0].tokens)}", greedy=True))
    tree_outcome = next(outcome for outcome in outcomes if "tree" in outcome.method.options)
    # A small model repeats itself at times; the liveliest continuation says most.
    number = max(range(len(tree_outcome.tokens)), key=lambda i: len(set(tree_outcome.tokens[i])))
    console.print("\nThe end of a prompt, and what the tree made of it ([green]green[/green]: accepted drafts):\n")
    context = pair.tokenizer.decode(prompts[number])[-CONTEXT:]
    console.print(context, style="dim", end="", markup=False, highlight=False)
    console.print(coloured(tree_outcome, number, pair.tokenizer))
    picture(outcomes, arguments.out, f"Lossless speculative decoding on {torch.get_num_threads()} CPU threads")
    console.print(f"\nPicture: {arguments.out}")
    lines = differing(outcomes)
    for line in lines:
        console.print(line, style="red")
    return 1 if lines else 0
