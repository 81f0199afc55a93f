"""`python -m specdec_kernels`: what was found on this machine, for people and, with `--json`, for programs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from importlib import metadata

import torch

import specdec_kernels
from specdec_kernels import backends, host

SETTINGS = ("SPECDEC_BACKEND", "SPECDEC_CPU_ISA", "SPECDEC_DEBUG", "TRITON_INTERPRET")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    """Processor, vector features as torch reads them, threads, and the tiers of the compiled kernels."""
    # Where an older torch has no such function, its own choice of instruction set stands in for the features.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    extensions = ("avx", "amx", "fma", "neon", "sve")
    vector = sorted(name for name, value in capabilities.items() if value is True and name.startswith(extensions))
    found = {
        "name": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": vector or [torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "tiers": None,
        "tier": None,
        "compiler": None,
    }
    if backends.MISSING["cpu"] is None:
        from specdec_kernels import _C

        found.update(tiers=list(_C.tiers()), tier=_C.isa(), compiler=_C.compiler())
    return found


def _gpus() -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
        )
    return found


def collect() -> dict:
    """Everything that is printed, as plain values."""
    return {
        "versions": {
            "specdec_kernels": specdec_kernels.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton") if importlib.util.find_spec("triton") else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "backends": backends.table(),
        "host": {"available": host._MISSING is None, "reason": host._MISSING},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def render(found: dict) -> str:
    """The same for a person, one fact a line."""
    versions, cpu = found["versions"], found["cpu"]
    lines = [
        f"specdec_kernels {versions['specdec_kernels']}",
        f"  torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}, triton {versions['triton'] or 'none'}, "
        f"Python {versions['python']}",
        f"  {versions['platform']}",
        "backends",
    ]
    for name, backend in found["backends"].items():
        state = "yes" if backend["available"] else "no "
        lines.append(f"  {name:<10} {state}  {', '.join(backend['ops']) or 'no op'}")
        if backend["reason"]:
            lines.append(f"  {'':<15}{backend['reason']}")
    lines.append("host structures compiled" if found["host"]["available"] else "host structures in plain Python")
    if found["host"]["reason"]:
        lines.append(f"  {'':<15}{found['host']['reason']}")
    lines += [
        f"cpu  {cpu['name']} ({cpu['architecture']}), {cpu['threads']} threads",
        f"  features  {' '.join(cpu['features'])}",
    ]
    if cpu["tiers"] is not None:
        tiers = ", ".join(f"{tier} (chosen)" if tier == cpu["tier"] else tier for tier in cpu["tiers"])
        lines += [f"  tiers     {tiers}", f"  compiler  {cpu['compiler']}"]
    gpus = [f"gpu  {g['name']}, sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB" for g in found["gpus"]]
    lines += gpus or ["gpu  none that torch can use"]
    lines += [f"set  {name}={value}" for name, value in found["settings"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(prog="python -m specdec_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = collect()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else render(found))


if __name__ == "__main__":
    main()
