"""`python -m specdec_loop.tiny train` makes the pair, `python -m specdec_loop.tiny eval` measures it."""

import argparse
from pathlib import Path

import torch

from .evaluate import report
from .pair import DATA, load
from .train import train_pair


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m specdec_loop.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="make the pair; an interrupted run goes on where it was")
    train.add_argument("--out", type=Path, default=Path("build/tiny"), help="where the stages keep their results")
    train.add_argument("--export", type=Path, default=DATA, help="where the finished pair goes")
    train.add_argument("--corpus-bytes", type=int, default=45_000_000)
    train.add_argument("--target-tokens", type=int, default=12_000_000)
    train.add_argument("--target-lr", type=float, default=3e-3)
    train.add_argument("--generated-tokens", type=int, default=400_000)
    train.add_argument("--drafter-tokens", type=int, default=3_000_000)
    train.add_argument("--finetune-tokens", type=int, default=2_000_000)
    train.add_argument("--drafter-layers", type=int, default=2)
    train.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast in training")
    train.add_argument("--compile", action="store_true", help="torch.compile the layers (needs a C++ compiler)")
    evaluate = commands.add_parser("eval", help="measure a pair on held-out standard library text")
    evaluate.add_argument("--pair", type=Path, default=DATA, help="the folder that `train` exported to")
    evaluate.add_argument("--prompts", type=int, default=50)
    for command in (train, evaluate):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    """Runs one command."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.command == "train":
        train_pair(args)
    else:
        print(report(load(folder=args.pair), args.prompts))


if __name__ == "__main__":
    main()
