"""Build, test and measure on a CUDA machine: `python bench/gpu.py [--out out/gpu]`.

Writes beside each other: the log of every step, the benchmarks as pytest-benchmark left them, their table and pictures,
and summary.json with the hardware, the versions, the commit, each command, its exit status and its seconds. A step that
fails does not stop the next, so that one run tells as much as it can; the exit status is 1 if any failed. A step whose
tool is not there has the status "missing".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Under compute-sanitizer a kernel takes many times as long, so only tests of small inputs run there; and without the
# caching allocator, so that the end of every tensor is known, which capturing a graph needs.
SANITIZED = ("-k", "not graph", "tests/test_kv.py", "tests/test_verify_isolation.py")


def output_of(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "uncommitted": output_of("git", "status", "--porcelain"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "gpus": [{"name": g.name, "capability": f"{g.major}.{g.minor}", "bytes": g.total_memory} for g in gpus],
        "nvidia_smi": output_of("nvidia-smi", query, "--format=csv"),
        "nvcc": output_of("nvcc", "--version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "specdec_kernels": output_of(sys.executable, "-m", "specdec_kernels", "--json"),
    }


def steps(out: Path) -> dict[str, list[str] | None]:
    """The command of each step, in order; None where its tool is missing."""
    python, results = sys.executable, str(out / "results.json")
    found: dict[str, list[str] | None] = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [python, "-m", "pytest", "-m", "gpu", "tests"],
    }
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        tests = [python, "-m", "pytest", "-x", "-m", "gpu and not full", *SANITIZED]
        found[tool] = sanitizer and [sanitizer, "--tool", tool, "--error-exitcode", "86", *tests]
    files = ("bench/bench_gpu.py", "bench/bench_gpu_head.py", "bench/bench_gpu_attention.py")
    bench = [python, "-m", "pytest", "-s", "-m", "gpu", *files, f"--benchmark-json={results}"]
    return {**found, "bench": bench, "report": [python, "bench/report.py", results, "--out", str(out)]}


def run(name: str, command: list[str] | None, out: Path, environment: dict[str, str]) -> dict:
    """One step: its output goes to the terminal and to a log, what became of it is returned."""
    if command is None:
        print(f"== {name}: missing", flush=True)
        return {"command": None, "status": "missing", "seconds": 0.0}
    print(f"== {shlex.join(command)}", flush=True)
    started = time.monotonic()
    if name in ("memcheck", "racecheck"):
        environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        status = process.wait()
    return {"command": shlex.join(command), "status": status, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} of {sys.executable} sees no CUDA device; nothing was run.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    archs = sorted({".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())})
    environment = {
        **os.environ,
        "FORCE_CUDA": "1",
        "SPECDEC_REQUIRE_EXT": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(archs)),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
    }
    summary = {"steps": {}}
    for name, command in steps(out).items():
        summary["steps"][name] = run(name, command, out, environment)
        summary["machine"] = machine()
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    missing = [name for name, step in summary["steps"].items() if step["status"] == "missing"]
    failed = [name for name, step in summary["steps"].items() if step["status"] and name not in missing]
    print(f"{out}: " + (f"failed: {', '.join(failed)}" if failed else "all steps that could run passed"))
    if missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
