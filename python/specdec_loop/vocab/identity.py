"""Which vocabulary a file was made for, and the safetensors files that say so."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"


def tokenizer_hash(tokenizer) -> str:
    """The SHA-256 of a vocabulary's content, in hexadecimal: of its (token, id) pairs in the order of their ids.

    Two tokenizers with the same hash give an id the same text. How they cut text into tokens is not part of it.

    Args:
        tokenizer: a Hugging Face tokenizer, a `tokenizers.Tokenizer`, a mapping from token to id, or such a hash
            itself, which is handed back.

    Raises:
        TypeError, ValueError: none of these, or no tokens.
    """
    if isinstance(tokenizer, str):
        if not re.fullmatch("[0-9a-f]{64}", tokenizer):
            raise ValueError(f"tokenizer: expected a tokenizer or 64 hexadecimal digits, got {tokenizer!r}")
        return tokenizer
    vocabulary = tokenizer if isinstance(tokenizer, Mapping) else getattr(tokenizer, "get_vocab", lambda: None)()
    if not isinstance(vocabulary, Mapping):
        raise TypeError(
            f"tokenizer: expected one that has get_vocab(), a mapping or a hash, got {type(tokenizer).__name__}"
        )
    if not vocabulary:
        raise ValueError("tokenizer: expected at least one token, got none")
    pairs = sorted((int(number), token) for token, number in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def check_hash(path: Path, found: str, tokenizer, what: str = "tokenizer") -> None:
    """Raise ValueError unless a file was made for this tokenizer."""
    expected = tokenizer_hash(tokenizer)
    if found != expected:
        raise ValueError(
            f"{what}: expected a file for the vocabulary {expected[:12]}..., got {path} for another, {found[:12]}..."
        )


def write(path: Path | str, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of one kind; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"format": kind, "version": VERSION, **metadata})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def kind_of(path: Path | str) -> str | None:
    """The kind of a safetensors file that `write` made, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return None


def read(path: Path | str, kind: str, names: tuple[str, ...]) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors of a file of one kind, in the order of `names`, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, another version, or a tensor that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a {kind} file, got no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a {kind} file in safetensors, got {error}") from error
    if metadata.get("format") != kind:
        holds = ", ".join(sorted(tensors)) or "nothing"
        found = f"a {metadata['format']} file" if "format" in metadata else f"one without metadata that holds {holds}"
        raise ValueError(f"{path}: expected a {kind} file, got {found}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of a {kind} file, got {metadata.get('version')}")
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise ValueError(f"{path}: expected tensors {', '.join(names)}, got none named {', '.join(missing)}")
    return [tensors[name] for name in names], metadata
