"""Every configuration of the head's Triton kernels compiles for every target, within the shared memory of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_triton_aot import SHARED

pytest.importorskip("triton", reason="triton is not installed")

WORKER = Path(__file__).with_name("head_triton_aot.py")


@pytest.mark.parametrize(
    "which, everywhere, least", [("chosen", 2, 16), pytest.param("--full", 120, 120, marks=pytest.mark.full)]
)
def test_compiles_for_every_target(which, everywhere, least, tmp_path):
    """`everywhere` kernels for all targets, `least` in all."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(WORKER.parents[1])}  # an empty cache: compile
    command = [sys.executable, str(WORKER), *([which] if which == "--full" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    targets = {}
    for row in map(json.loads, done.stdout.splitlines()):
        targets.setdefault(row["name"], set()).add(row["target"])
        assert row["bytes"] > 0
        assert row["shared"] <= SHARED[row["target"]], row
    assert sum(compiled == set(SHARED) for compiled in targets.values()) >= everywhere
    assert len(targets) >= least
