"""Every Triton kernel compiles for GPUs that need not be here, within the shared memory of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

WORKER = Path(__file__).with_name("triton_aot.py")
# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities; AMD CDNA3 LDS).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024}


@pytest.mark.parametrize("which", ["chosen", pytest.param("--full", marks=pytest.mark.full)])
def test_compiles_for_every_target(which, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(WORKER.parents[1])}  # an empty cache: compile
    command = [sys.executable, str(WORKER), *([which] if which == "--full" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    targets = {}
    for row in rows:
        targets.setdefault(row["name"], set()).add(row["target"])
        assert row["bytes"] > 0
        assert row["shared"] <= SHARED[row["target"]], row
    everywhere = [name for name, compiled in targets.items() if compiled == set(SHARED)]
    assert len(everywhere) >= (40 if which == "--full" else 1)
    assert len(targets) >= (40 if which == "--full" else 16)
