"""The Triton kernels of attention, trees and kv compile for GPUs that need not be here, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_triton_aot import SHARED

pytest.importorskip("triton", reason="triton is not installed")

WORKER = Path(__file__).with_name("attention_triton_aot.py")


@pytest.mark.parametrize("which, least", [("chosen", 10), pytest.param("--full", 400, marks=pytest.mark.full)])
def test_compiles_for_every_target(which, least, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(WORKER.parents[1])}  # an empty cache: compile
    command = [sys.executable, str(WORKER), *([which] if which == "--full" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["bytes"] > 0
        assert row["shared"] <= SHARED[row["target"]], row
    assert {row["target"] for row in rows} == set(SHARED)
    assert len(rows) >= least
