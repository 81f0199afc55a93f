"""What quantising a head and using it take beside arguments and results: no second copy of the weight in any form."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import backends

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HEIGHT, DIM, BATCH = 16_384, 1024, 4
FORMATS = ["int8", "int4", "fp8"]


def measure() -> dict[str, int]:
    """Peak bytes of each call beyond what was in use before it, less its results."""
    counter = ctypes.CDLL(None)
    counter.malloc_reset.restype = counter.malloc_peak.restype = ctypes.c_long
    peaks = {}

    def peak(name, call, held=lambda result: 0):
        call()  # what is made once and kept does not count
        before = counter.malloc_reset()
        result = call()
        peaks[name] = counter.malloc_peak() - before - held(result)
        return result

    weight = torch.randn(HEIGHT, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.arange(0, HEIGHT, 2, dtype=torch.int32)
    rng = sk.Philox(torch.arange(BATCH), torch.arange(BATCH))
    peak("fp32", weight.float)
    for format in FORMATS:
        head = peak(
            f"quantize {format}",
            lambda format=format: sk.quantize_head(weight, format),
            lambda head: head.values.nbytes + head.scales.nbytes,
        )
        peak(f"topk {format}", lambda head=head: sk.head_topk(hidden, head, 8, backend="cpu"))
        peak(f"sample {format}", lambda head=head: sk.head_sample(hidden, head, 8, rng=rng, rows=rows, backend="cpu"))
    return peaks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the counter stands in front of glibc's malloc")
def test_no_copy_of_the_weight(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no compiler for the counter")
    library, source = tmp_path / "malloc_peak.so", Path(__file__).with_name("malloc_peak.cpp")
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout)
    assert peaks.pop("fp32") >= 4 * HEIGHT * DIM, "the counter sees what torch allocates"
    assert len(peaks) == 3 * len(FORMATS)
    for name, peak in peaks.items():
        # Quantising works in slices of 1 MB in fp32, of which a handful are alive.
        assert peak < (16 << 20 if name.startswith("quantize") else 1 << 20), (name, peak)


if __name__ == "__main__":
    print(json.dumps(measure()))
