"""How tests run tree_attention on Triton: on a GPU, or under the interpreter, which is chosen when triton is imported.

In a process that is not for the interpreter its tests are skipped; tests/test_attention_triton_runs.py starts one.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from attention_cases import NAN, Case, bits_of, naive
from specdec_kernels import SharedPrefix, TreeLayout
from verify_backends import TRITON_DEVICES

pytest.importorskip("triton", reason="triton is not installed")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

each_device = pytest.mark.parametrize("device", TRITON_DEVICES)


def there(value, device):
    """Tuples of tensors on `device`; Case.run moves tensors and its tree."""
    moved = isinstance(value, (SharedPrefix, TreeLayout))
    return type(value)(*(x.to(device) for x in value)) if moved else value


@contextlib.contextmanager
def poisoned():
    """Memory that a kernel gets holds NaN and -7777, so that what nobody wrote is seen."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        fresh = plain(self, *args, **kwargs)
        return fresh.fill_(NAN if fresh.dtype.is_floating_point else -7777) if fresh.itemsize > 1 else fresh

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield


@contextlib.contextmanager
def small_tiles():
    """Tiles of 16 rows and 16 slots, splits of one block: small cases then meet every loop and every merge."""
    from specdec_kernels.triton import attention
    from specdec_kernels.triton.attention_configs import Config

    config = mock.patch.object(attention, "choose", lambda *shape: Config(16, 16, 4, 2, 2))
    with config, mock.patch.object(attention, "LEAST_BLOCKS", 1):
        yield


def run(case: Case, device, *, small=False, **options):
    """(out, lse) on the host."""
    options = {name: there(value, device) for name, value in options.items()}
    with poisoned(), small_tiles() if small else contextlib.nullcontext():
        out, lse = case.run(device, backend="triton", return_lse=True, **options)
    return out.cpu(), lse.cpu()


def close(got, want, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got[0].double(), want[0].double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1].double(), want[1].double(), atol=1e-4, rtol=1e-4)


def check(case: Case, device, *, small=False, **options):
    """Against the definition in float64, whatever the cache; slots that no node sees hold NaN."""
    want = naive(case, **options)
    if options.get("mask") is not None:
        options["mask_bits"] = bits_of(options["mask"], case.tree.max_nodes)
    options.pop("mask", None)
    for caches in ({}, case.paged(4)):
        got = run(case, device, small=small, **caches, **options)
        assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
        close(got, want, case.dtype)


def check_reference(case: Case, device, *, small=False, **options):
    want = case.run(backend="reference", return_lse=True, **options)
    close(run(case, device, small=small, **options), want, case.dtype)
