"""What every benchmark result is stored with: the versions and the machine it was measured on."""

from __future__ import annotations

import os

import pytest
from common import require_pinned_threads

from specdec_kernels.__main__ import collect


def pytest_benchmark_update_machine_info(config, machine_info):
    found = collect()
    machine_info.update(
        torch=found["versions"]["torch"],
        triton=found["versions"]["triton"],
        threads=found["cpu"]["threads"],
        pinned=os.environ.get("OMP_PROC_BIND", "no"),
        isa=found["cpu"]["tier"],
        gpu=", ".join(gpu["name"] for gpu in found["gpus"]),
    )


@pytest.fixture(autouse=True)
def pinned_threads():
    """Before the inputs are made, which takes longer than most measurements."""
    require_pinned_threads()
