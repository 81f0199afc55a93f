"""`python -m specdec_kernels` says what is there, and why the rest is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import __main__ as command
from specdec_kernels import backends


def test_json_is_what_the_package_found(capsys):
    command.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["specdec_kernels"] == sk.__version__
    assert found["backends"] == backends.table()
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for name, backend in found["backends"].items():
        assert backend["available"] == (backend["reason"] is None), name


def test_text_names_every_backend_with_its_reason(capsys):
    command.main([])
    text = capsys.readouterr().out
    for name, backend in backends.table().items():
        assert f"\n  {name:<10} {'yes' if backend['available'] else 'no '}  " in text
        assert backend["reason"] is None or backend["reason"] in text
    assert torch.__version__ in text


def test_text_of_a_machine_without_anything():
    found = command.collect()
    found["versions"].update(triton=None, cuda=None)
    found["cpu"].update(tiers=None, tier=None, compiler=None)
    found["host"] = {"available": False, "reason": "no compiler"}
    found["gpus"] = []
    found["settings"] = {"SPECDEC_BACKEND": "reference"}
    text = command.render(found)
    assert "triton none" in text
    assert "tiers" not in text
    assert "host structures in plain Python\n                 no compiler\n" in text
    assert "gpu  none that torch can use" in text
    assert text.endswith("set  SPECDEC_BACKEND=reference")


def test_text_of_a_gpu():
    found = {**command.collect(), "gpus": [{"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}]}
    assert "gpu  NVIDIA H200, sm_90, 139.8 GiB" in command.render(found)


@pytest.mark.skipif(backends.MISSING["cpu"] is not None, reason=f"cpu backend: {backends.MISSING['cpu']}")
def test_tiers():
    cpu = command.collect()["cpu"]
    assert cpu["tiers"][0] == "scalar"
    assert cpu["tier"] in cpu["tiers"]
    assert cpu["compiler"].split()[0] in ("gcc", "clang")


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "specdec_kernels"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"specdec_kernels {sk.__version__}\n")
