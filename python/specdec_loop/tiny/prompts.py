"""Held-out prompts, read from the running interpreter's standard library so that none are shipped."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .corpus import SourceFile, heldout_stdlib

# Tables of code points, a package of which edited copies are vendored elsewhere, and what some distributions leave out.
UNFIT = ("encodings/", "distutils/", "lib2to3/", "idlelib/")
LINES_APART = 30
# More characters than any token of source code has on average, so that a slice of text is long enough.
CHARS_PER_TOKEN = 12


def prompt_files() -> list[SourceFile]:
    """The held-out standard library files that prompts are cut from, in the order of their names."""
    return [file for file in heldout_stdlib() if not file.name.startswith(UNFIT) and len(file.text) > 2000]


def heldout_prompts(n: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[n, tokens] int64: passages of source code that neither model was trained on, the same at every call.

    The passages begin at line starts behind the files' headers, `LINES_APART` lines from one another, and one of each
    file comes in turn.
    """
    if n < 1 or tokens < 1:
        raise ValueError(f"n and tokens: got {n} and {tokens}, expected at least 1 of each")
    files = [file.text.splitlines(keepends=True) for file in prompt_files()]
    rows: list[list[int]] = []
    longest = max((len(lines) for lines in files), default=0)
    for line in range(LINES_APART, longest, LINES_APART):
        for lines in files:
            if len(rows) == n:
                break
            passage = "".join(lines[line : line + tokens])[: tokens * CHARS_PER_TOKEN]
            ids = tokenizer(passage, add_special_tokens=False)["input_ids"][:tokens]
            if len(ids) == tokens:
                rows.append(ids)
    if len(rows) < n:
        raise ValueError(
            f"n: got {n} prompts of {tokens} tokens, expected at most {len(rows)}: "
            f"that is what {len(files)} held-out files of this Python's standard library hold"
        )
    return torch.tensor(rows, dtype=torch.int64)
