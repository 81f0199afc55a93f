"""Shared fixtures: devices that exist, devices that are named when they do not."""

from __future__ import annotations

import pytest
import torch

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[GPU, pytest.mark.gpu])])
def device(request) -> str:
    return request.param
