"""What every benchmark result is stored with: the versions and the machine it was measured on."""

from __future__ import annotations

import os

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
