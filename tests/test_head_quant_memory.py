"""What quantising a head and using it take beside arguments and results: no second copy of the weight in any form."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from malloc_peak import peak, peaks_of, report
from specdec_kernels import backends

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HEIGHT, DIM, BATCH = 16_384, 1024, 4
FORMATS = ["int8", "int4", "fp8"]


def measure() -> dict[str, int]:
    """Peak bytes of each call beyond what was in use before it, less its results."""
    peaks = {}

    def count(name, call, held=lambda result: 0):
        peaks[name], result = peak(call, held)
        return result

    weight = torch.randn(HEIGHT, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.arange(0, HEIGHT, 2, dtype=torch.int32)
    rng = sk.Philox(torch.arange(BATCH), torch.arange(BATCH))
    count("fp32", weight.float)
    for format in FORMATS:
        head = count(
            f"quantize {format}",
            lambda format=format: sk.quantize_head(weight, format),
            lambda head: head.values.nbytes + head.scales.nbytes,
        )
        count(f"topk {format}", lambda head=head: sk.head_topk(hidden, head, 8, backend="cpu"))
        count(f"sample {format}", lambda head=head: sk.head_sample(hidden, head, 8, rng=rng, rows=rows, backend="cpu"))
    return peaks


def test_no_copy_of_the_weight(tmp_path):
    peaks = peaks_of(__file__, tmp_path)
    assert peaks.pop("fp32") >= 4 * HEIGHT * DIM, "the counter sees what torch allocates"
    assert len(peaks) == 3 * len(FORMATS)
    for name, size in peaks.items():
        # Quantising works in slices of 1 MB in fp32, of which a handful are alive.
        assert size < (16 << 20 if name.startswith("quantize") else 1 << 20), (name, size)


if __name__ == "__main__":
    report(measure)
