"""Shared fixtures: devices that exist, devices that are named when they do not."""

from __future__ import annotations

import pytest
import torch

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[GPU, pytest.mark.gpu])])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def head_library(tmp_path_factory):
    """The head's CUDA code as a library for the host."""
    import cuda_head

    return cuda_head.build(tmp_path_factory.mktemp("cuda_head"))


@pytest.fixture(params=["host", pytest.param("gpu", marks=[GPU, pytest.mark.gpu])])
def head_ops(request):
    """The head's ops of backend `cuda`, which the public functions call for the length of a test."""
    import cuda_head

    ops = cuda_head.Gpu() if request.param == "gpu" else cuda_head.Host(request.getfixturevalue("head_library"))
    with ops.instead():
        yield ops
