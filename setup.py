"""The compiled modules. Everything else about the distribution is in pyproject.toml.

Each kernel file of csrc/cpu is compiled once per instruction set ("tier") into its own namespace, which setuptools
cannot express, so this file has its own small build: every object keeps a dependency file and the command that made
it, and is made again only when one of them changed.

Environment:
    SPECDEC_NO_EXT=1       build nothing; the package runs on its references (and Triton)
    SPECDEC_REQUIRE_EXT=1  a module that does not build is an error, not a notice
    SPECDEC_CXXFLAGS       further compiler and linker flags, e.g. -fsanitize=address
    MAX_JOBS               compilers at a time (default: the cores this process may use)
    USE_CUDA=0             no CUDA module; FORCE_CUDA=1: also where torch has no CUDA
    TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX" (default 8.0;9.0;10.0+PTX)
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

# The oldest torch whose stable ABI the modules use, and the oldest Python of the modules without pybind11.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030a0000"

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_TIERS = {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"]}
# The torch edge and the dispatcher; every other file of csrc/cpu is a kernel file and is compiled per tier.
EDGE = re.compile(r"(ops_\w+|module|dispatch)\.cpp")
# No contraction: an acceptance test must round alike in every tier and backend.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]


class BuildError(Exception):
    """Why a module cannot be built, in one sentence."""


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {command[0]!r} is not on PATH")
    return command


def tiers(cxx: list[str]) -> dict[str, list[str]]:
    """The instruction sets this compiler can target, each with its flags."""
    found = {"scalar": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        for tier, flags in X86_TIERS.items():
            probe = [*cxx, *flags, "-E", "-x", "c++", os.devnull]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                found[tier] = flags
    return found


def torch_paths() -> tuple[list[str], str]:
    """(include flags, library directory) of the torch that is installed."""
    import torch

    root = Path(torch.__file__).parent
    return [f"-isystem{root / 'include'}"], str(root / "lib")


class Job:
    """One object or module: how it is made, from what, and whether it is out of date."""

    def __init__(self, output: Path, command: list[str], inputs: list[Path]):
        self.output, self.command, self.inputs = output, command, inputs
        self._record, self._depfile = Path(f"{output}.cmd"), Path(f"{output}.d")

    def _dependencies(self) -> list[Path]:
        if not self._depfile.exists():
            return self.inputs
        text = self._depfile.read_text().replace("\\\n", " ").split(":", 1)[1]
        return [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", text.strip())]

    def stale(self) -> bool:
        if (
            not self.output.exists()
            or not self._record.exists()
            or self._record.read_text() != shlex.join(self.command)
        ):
            return True
        made = self.output.stat().st_mtime_ns
        return any(not path.exists() or path.stat().st_mtime_ns > made for path in self._dependencies())

    def run(self) -> None:
        if not self.stale():
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"this command failed:\n{shlex.join(self.command)}\n{done.stdout}{done.stderr}")
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        self._record.write_text(shlex.join(self.command))


def compile_job(cxx: list[str], source: Path, flags: list[str], where: str) -> Job:
    output = BUILD / where / f"{source.name}.o"
    extra = shlex.split(os.environ.get("SPECDEC_CXXFLAGS", ""))
    depfile = ["-MMD", "-MF", f"{output}.d"]
    command = [*cxx, *CXXFLAGS, f"-I{CSRC / 'include'}", *flags, *extra, *depfile, "-c", str(source), "-o", str(output)]
    return Job(output, command, [source])


def link_job(cxx: list[str], name: str, suffix: str, objects: list[Path], flags: list[str]) -> Job:
    output = BUILD / f"{name}{suffix}"
    shared = (
        ["-shared", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-as-needed"]
    )
    extra = shlex.split(os.environ.get("SPECDEC_CXXFLAGS", ""))
    return Job(output, [*cxx, *shared, *map(str, objects), *flags, *extra, "-o", str(output)], objects)


def python_flags() -> list[str]:
    return [f"-isystem{sysconfig.get_path('include')}"]


def edge_flags() -> list[str]:
    includes, _ = torch_paths()
    return [*python_flags(), *includes, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]


def plan_cpu(suffix: str) -> tuple[list[Job], Job]:
    """`_C`: kernels once per tier, the torch edge once."""
    cxx, jobs = compiler(), []
    found = tiers(cxx)
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    kernels = [source for source in sources if not EDGE.fullmatch(source.name)]
    for tier, flags in found.items():
        # Nothing here reads errno; gcc 12 takes its own AVX-512 intrinsics for uninitialised.
        flags = [
            *flags,
            "-fno-math-errno",
            "-Wno-uninitialized",
            f"-DSPECDEC_TIER={tier}",
            f"-DSPECDEC_TIER_{tier.upper()}",
        ]
        jobs += [compile_job(cxx, source, flags, f"cpu-{tier}") for source in kernels]
    listed = f"-DSPECDEC_TIERS(X)={' '.join(f'X({tier})' for tier in found)}"
    jobs += [compile_job(cxx, s, [*edge_flags(), listed], "cpu") for s in sources if EDGE.fullmatch(s.name)]
    _, library = torch_paths()
    objects = [job.output for job in jobs]
    return jobs, link_job(cxx, "_C", suffix, objects, [f"-L{library}", "-ltorch_cpu"])


def cuda_archs() -> list[str]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
    flags = []
    for arch in re.split(r"[;\s]+", listed.strip()):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan_cuda(suffix: str) -> tuple[list[Job], Job]:
    """`_C_cuda`: .cu files through nvcc, .cpp files through the host compiler."""
    cxx, jobs = compiler(), []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise BuildError("no CUDA compiler: nvcc is not on PATH and CUDA_HOME does not name a toolkit")
    if home is None:
        # nvcc itself knows where it lives, also behind a wrapper script.
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"TOP=(\S+)", said)
        home = Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]
    flags = [*edge_flags(), "-DUSE_CUDA", f"-isystem{Path(home) / 'include'}"]
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        output = BUILD / "cuda" / f"{source.name}.o"
        options = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [str(nvcc), "-ccbin", cxx[0], *options, *cuda_archs(), f"-I{CSRC / 'include'}"]
        command += [option.replace("-isystem", "-isystem=", 1) for option in flags]  # nvcc's spelling
        command += ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        jobs.append(Job(output, command, [source]))
    jobs += [compile_job(cxx, source, flags, "cuda") for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    _, library = torch_paths()
    toolkit = next((p for p in (Path(home) / "lib64", Path(home) / "lib") if p.exists()), Path(home) / "lib64")
    # libtorch brings libtorch_cuda where torch has CUDA and is all there is to link with where it has not.
    link = [f"-L{library}", "-ltorch", f"-L{toolkit}", "-lcudart"]
    return jobs, link_job(cxx, "_C_cuda", suffix, [job.output for job in jobs], link)


def plan_host(suffix: str) -> tuple[list[Job], Job]:
    """`_host`: host structures behind pybind11, without torch."""
    cxx = compiler()
    try:
        import pybind11

        include = [f"-isystem{pybind11.get_include()}"]
    except ImportError:
        include, _ = torch_paths()  # torch ships pybind11's headers
    flags = [*python_flags(), *include]
    jobs = [compile_job(cxx, source, flags, "host") for source in sorted((CSRC / "host").glob("*.cpp"))]
    return jobs, link_job(cxx, "_host", suffix, [job.output for job in jobs], [])


PLANS = {"_C": plan_cpu, "_C_cuda": plan_cuda, "_host": plan_host}


class build_native(build_ext):
    def build_extensions(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = int(os.environ.get("MAX_JOBS") or cores or 1)
        names, built = [ext.name.rpartition(".")[2] for ext in self.extensions], []
        with ThreadPoolExecutor(workers) as pool:
            for ext, name in zip(self.extensions, names, strict=True):
                try:
                    jobs, link = PLANS[name](Path(self.get_ext_filename(ext.name)).name.removeprefix(name))
                    for _ in pool.map(Job.run, jobs):
                        pass
                    link.run()
                except BuildError as error:
                    if flag("SPECDEC_REQUIRE_EXT"):
                        sys.exit(f"specdec_kernels.{name} was not built: {error}")
                    print(
                        f"specdec_kernels.{name} was not built, so its ops run on slower backends: {error}",
                        file=sys.stderr,
                    )
                    continue
                target = Path(self.get_ext_fullpath(ext.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                # Through a new file: a running process keeps the module it has mapped.
                shutil.copyfile(link.output, f"{target}.new")
                os.replace(f"{target}.new", target)
                built.append(ext)
        # What was not built is not there to be copied into a wheel or next to the sources.
        self.extensions = built


def extensions() -> list[Extension]:
    if flag("SPECDEC_NO_EXT"):
        return []
    try:
        import torch
    except ImportError:
        # Listing sources and metadata needs no torch; compiling does. pip asks for metadata first: say it then.
        if {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"} & set(sys.argv):
            sys.exit(
                "specdec_kernels compiles against the torch that it will run with, and none is installed here: type "
                "`pip install torch==2.13.0 'setuptools>=77' pybind11` and then `pip install --no-build-isolation .`"
            )
        return []
    found = []
    if any((CSRC / "cpu").glob("*.cpp")):
        found.append(Extension("specdec_kernels._C", [], py_limited_api=True))
    wants_cuda = os.environ.get("USE_CUDA", "1") != "0" and (torch.version.cuda or flag("FORCE_CUDA"))
    if wants_cuda and any((CSRC / "cuda").glob("*.cu")):
        found.append(Extension("specdec_kernels._C_cuda", [], py_limited_api=True))
    if any((CSRC / "host").glob("*.cpp")):
        found.append(Extension("specdec_kernels._host", []))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": build_native})
