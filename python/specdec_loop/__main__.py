"""Command line: `python -m specdec_loop generate --target PATH --drafter PATH --prompt TEXT`, `vocab` or `demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from specdec_kernels import SamplingParams

from . import demo
from .compare import PLAIN, Method, coloured, compare, differing, make_console, picture, table
from .drafters import HEAD_KINDS, Drafter, LowRankHead, ModelDrafter, NgramDrafter, Tree
from .packed import pack_linears_
from .vocab import command as vocab
from .vocab import load_rows

KINDS = (PLAIN, "chain", "tree", "ngram", "ngram-tree")
LOW_RANK = "low-rank"


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    parser.add_argument("--target", required=True, help="folder of a Hugging Face causal LM and its tokenizer")
    parser.add_argument("--drafter", help="folder of a smaller one with the same tokenizer")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--prompt-file", type=Path, action="append", help="file whose text is continued")
    parser.add_argument("--methods", help=f"comma-separated choice of {', '.join(KINDS)}; the first always runs")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-length", type=int, default=4, help="drafts in a chain")
    parser.add_argument("--nodes", type=int, default=32, help="nodes of a ranked tree, its root included")
    parser.add_argument("--depth", type=int, default=6, help="depth of a ranked tree")
    parser.add_argument("--width", type=int, default=8, help="nodes of a ranked tree expanded at each level")
    parser.add_argument("--branching", default="4,2,1,1,1", help="children at each level of a sampled tree")
    parser.add_argument("--rows", type=Path, help="map of `vocab choose`, or safetensors with one tensor of ids")
    parser.add_argument(
        "--head",
        choices=(*HEAD_KINDS, LOW_RANK),
        help="the drafter's head: full, trimmed to --rows, quantised (of --rows, if given), or of --rank",
    )
    parser.add_argument("--rank", type=int, help=f"of --head {LOW_RANK}: a truncated SVD of the drafter's head")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write a picture there")


def run_generate(arguments: argparse.Namespace) -> int:
    """Decode the prompts with each method; 1 if a greedy fp32 output differs from autoregressive decoding."""
    console = make_console()
    logging.disable_progress_bar()
    texts = [*(arguments.prompt or ()), *(path.read_text() for path in arguments.prompt_file or ())]
    if not texts:
        raise ValueError("prompt: expected at least one --prompt or --prompt-file")
    target, tokenizer = _load(arguments.target, arguments)
    kinds = _kinds(arguments)
    drafter = _drafter(arguments, tokenizer) if {"chain", "tree"} & set(kinds) else None
    methods = [_method(kind, arguments, drafter) for kind in kinds]
    params = SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0].to(target.device) for text in texts]
    outcomes = compare(
        target, methods, prompts, console, max_new_tokens=arguments.max_new_tokens, params=params, seeds=arguments.seed
    )
    for number, text in enumerate(texts):
        console.rule(f"prompt {number}")
        console.print(text, style="dim", end="", markup=False, highlight=False)
        console.print(coloured(outcomes[-1], number, tokenizer))
    greedy = arguments.temperature == 0
    console.print(
        table(outcomes, f"prompts: {len(texts)}; the text above is by {outcomes[-1].method.name}", greedy=greedy)
    )
    if arguments.out is not None:
        picture(outcomes, arguments.out, f"{arguments.target}, drafter {arguments.drafter}")
    lines = differing(outcomes) if greedy else []
    for line in lines:
        console.print(line, style="red")
    if lines and arguments.dtype != "float32":
        console.print("In 16 bits a tie may fall differently when several tokens run in one forward.")
        return 0
    return 1 if lines else 0


def _kinds(arguments: argparse.Namespace) -> list[str]:
    """The methods asked for; by default all that the arguments allow."""
    if arguments.methods is None:
        return [PLAIN, "chain", "tree"] if arguments.drafter else [PLAIN, "ngram"]
    kinds = arguments.methods.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    if not arguments.drafter and {"chain", "tree"} & set(kinds):
        raise ValueError("drafter: expected a folder for chain and tree, got none")
    return kinds if PLAIN in kinds else [PLAIN, *kinds]


def _method(kind: str, arguments: argparse.Namespace, drafter: Drafter | None) -> Method:
    branching = tuple(int(k) for k in arguments.branching.split(","))
    tree = {"tree": Tree(arguments.nodes, arguments.depth, arguments.width, branching)}
    chain = {"draft_length": arguments.draft_length}
    if kind == PLAIN:
        return Method(PLAIN, None, {})
    if kind.startswith("ngram"):
        return Method(kind, NgramDrafter(), chain if kind == "ngram" else tree)
    return Method(kind, drafter, chain if kind == "chain" else tree)


def _drafter(arguments: argparse.Namespace, tokenizer) -> Drafter:
    model, own = _load(arguments.drafter, arguments)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"drafter: expected the tokenizer of {arguments.target}, got another in {arguments.drafter}")
    rows = None
    if arguments.rows is not None:
        rows = load_rows(arguments.rows, tokenizer, model.get_output_embeddings().weight.shape[0])
    if (arguments.head == LOW_RANK) != (arguments.rank is not None):
        got = "none" if arguments.rank is None else f"--head {arguments.head}"
        raise ValueError(f"rank: expected with --head {LOW_RANK} and with no other, got {got}")
    if arguments.head == LOW_RANK:
        return ModelDrafter(model, head=LowRankHead(model, arguments.rank, rows=rows))
    return ModelDrafter(model, rows=rows, head=arguments.head)


def _load(folder: str, arguments: argparse.Namespace):
    """Model and tokenizer of a folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"expected a folder with a model, got {folder}")
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(arguments.device).eval()
    pack_linears_(model)
    # Checkpoints of one tokenizer may share it in the folder above, as the shipped pair does.
    own = (Path(folder) / "tokenizer_config.json").exists()
    return model, AutoTokenizer.from_pretrained(folder if own else Path(folder).resolve().parent, local_files_only=True)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; arguments that do not fit end with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m specdec_loop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_generate_arguments(commands.add_parser("generate", help="decode prompts with local checkpoints"))
    demo.add_arguments(commands.add_parser("demo", help="decode held-out source code with the shipped pair"))
    vocab.add_arguments(commands.add_parser("vocab", help="choose the trimmed vocabulary of a drafter's head"))
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "vocab":
            return vocab.run(arguments, _load)
        return demo.run(arguments) if arguments.command == "demo" else run_generate(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
