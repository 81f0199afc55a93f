"""How tests count what a call allocates: a process of its own, with tests/malloc_peak.cpp in front of malloc.

The test's file, run as a script, calls `report(measure)`; the test itself calls `peaks_of(__file__, tmp_path)`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def peak(call: Callable[[], object], held: Callable[[object], int] = lambda result: 0) -> tuple[int, object]:
    """(bytes, result): the most that `call` allocates beyond what was in use before it, less what its result holds."""
    counter = ctypes.CDLL(None)
    counter.malloc_reset.restype = counter.malloc_peak.restype = ctypes.c_long
    call()  # what is made once and kept does not count
    before = counter.malloc_reset()
    result = call()
    return counter.malloc_peak() - before - held(result), result


def report(measure: Callable[[], dict[str, int]]) -> None:
    """What the process prints."""
    print(json.dumps(measure()))


def peaks_of(script: str, tmp_path: Path) -> dict[str, int]:
    """What `script` reports when it runs behind the counter."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the counter stands in front of glibc's malloc")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no compiler for the counter")
    library, source = tmp_path / "malloc_peak.so", Path(__file__).with_suffix(".cpp")
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
