"""The text: Python sources that lie on any machine, and the files of it that training never sees.

Nothing is downloaded and nothing is copied into the repository: the corpus is the running interpreter's standard
library and the installed packages, without their tests. A file is held out by a hash of its path relative to its root
(`json/decoder.py`), so every machine holds out the same files whatever else is installed there.
"""

import hashlib
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HELDOUT_PERCENT = 2
# Part of the hash, fixed once: with this value the held-out files include large, well-written standard library modules.
SPLIT_SALT = "specdec-14"
# The standard library comes first and whole; the cap keeps one huge package from becoming most of the text.
MAX_BYTES_PER_PACKAGE = 9_000_000
MAX_FILE_BYTES = 400_000
# A training file of which more lines than this stand in held-out standard library files is a copy.
MAX_SHARED_LINES = 0.3
TEST_PARTS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages"}


class SourceFile(NamedTuple):
    """One source file: `name` is its path relative to its root, with forward slashes."""

    name: str
    text: str


def digest(text: str) -> str:
    """The SHA-256 of `text` in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_heldout(name: str) -> bool:
    """Whether the file `name` (path relative to its root, forward slashes) is kept from training."""
    return int(digest(f"{SPLIT_SALT}/{name}")[:16], 16) % 100 < HELDOUT_PERCENT


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_paths(root: Path) -> list[Path]:
    """The `*.py` files below `root` that are not tests, in the order of their relative paths."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if TEST_PARTS.isdisjoint(relative.parts) and not relative.name.startswith(("test_", "conftest")):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_source(path: Path) -> str | None:
    """The text of `path`; None where it is empty, too large to be written by hand, or not UTF-8."""
    raw = path.read_bytes()
    if not raw.strip() or len(raw) > MAX_FILE_BYTES:
        return None
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def heldout_stdlib() -> list[SourceFile]:
    """The held-out files of the running interpreter's standard library, in the order of their names."""
    root = stdlib_root()
    files = []
    for path in source_paths(root):
        name = path.relative_to(root).as_posix()
        if is_heldout(name) and (text := read_source(path)) is not None:
            files.append(SourceFile(name, text))
    return files


def long_lines(text: str) -> set[str]:
    """The distinct lines of `text` that are long enough to be recognised elsewhere."""
    return {line for raw in text.splitlines() if len(line := raw.strip()) > 20}


def drop_near_copies(train: list[SourceFile], prompts: list[SourceFile]) -> list[SourceFile]:
    """`train` without the files that are mostly made of lines of `prompts`.

    Packages vendor edited copies of standard library modules (tomli, backports), which equal contents do not catch.
    """
    seen = set().union(*(long_lines(file.text) for file in prompts))
    kept = []
    for file in train:
        lines = long_lines(file.text)
        if not lines or len(lines & seen) <= MAX_SHARED_LINES * len(lines):
            kept.append(file)
    return kept


def collect(max_bytes: int) -> tuple[list[SourceFile], list[SourceFile]]:
    """Training and held-out files, about `max_bytes` of text in all, without duplicates.

    Held-out files win over training files of the same content.
    """
    stdlib = stdlib_root()
    roots = [stdlib]
    for key in ("purelib", "platlib"):
        if (root := Path(sysconfig.get_path(key))) not in roots and root.is_dir():
            roots.append(root)
    files: dict[str, SourceFile] = {}
    package_bytes: Counter[tuple[Path, str]] = Counter()
    total = 0
    for root in roots:
        # In the order of a hash, so that the cap takes an even sample of what is installed.
        for path in sorted(source_paths(root), key=lambda path: digest(path.relative_to(root).as_posix())):
            name = path.relative_to(root).as_posix()
            package = (root, name.split("/")[0])
            if (text := read_source(path)) is None or total + len(text) > max_bytes:
                continue
            if root != stdlib and package_bytes[package] + len(text) > MAX_BYTES_PER_PACKAGE:
                continue
            key = digest(text)
            if key not in files:
                total += len(text)
                package_bytes[package] += len(text)
            if key not in files or is_heldout(name):
                files[key] = SourceFile(name, text)
    heldout = [file for file in files.values() if is_heldout(file.name)]
    train = [file for file in files.values() if not is_heldout(file.name)]
    return drop_near_copies(train, heldout_stdlib()), heldout
