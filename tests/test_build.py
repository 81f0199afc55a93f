"""setup.py: what it says where it cannot build, and that it builds only what changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specdec_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
# Runs setup.py as `python setup.py` does, with torch out of reach.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(*arguments: str, torch: bool = True, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPECDEC_")}
    start = ["setup.py"] if torch else ["-c", WITHOUT_TORCH]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**inherited, "USE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def test_without_torch_one_sentence_says_what_to_type(tmp_path):
    done = setup("dist_info", "--output-dir", str(tmp_path), torch=False)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert len(said) == 1
    assert "pip install torch" in said[0] and "pip install --no-build-isolation ." in said[0]


def test_without_torch_the_references_can_still_be_installed():
    done = setup("--quiet", "--name", torch=False, SPECDEC_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "specdec_kernels"


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    command = ("--quiet", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    done = setup(*command, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    expected = (
        "specdec_kernels._C was not built, so its ops run on slower backends: "
        "no C++ compiler: 'no-such-compiler' is not on PATH"
    )
    assert expected in done.stderr.splitlines()
    assert not list(tmp_path.rglob("*.so"))
    required = setup(*command, CXX="no-such-compiler", SPECDEC_REQUIRE_EXT="1")
    assert required.returncode == 1
    assert "specdec_kernels._C was not built: no C++ compiler" in required.stderr


@pytest.mark.skipif("was not built" in str(backends.MISSING["cpu"]), reason="nothing is built here")
def test_only_what_changed_is_compiled(tmp_path):
    """In a small copy with two files, one of which includes a header."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "specdec_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").mkdir()
    host = tmp_path / "csrc" / "host"
    host.mkdir(parents=True)
    (host / "answer.h").write_text("int answer();\n")
    (host / "answer.cpp").write_text('#include "answer.h"\nint answer() { return 42; }\n')
    (host / "module.cpp").write_text(
        '#include <Python.h>\nPyMODINIT_FUNC PyInit__host() { return PyModule_New("_host"); }\n'
    )

    def build() -> dict[str, int]:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**os.environ, "SPECDEC_REQUIRE_EXT": "1", "SPECDEC_CXXFLAGS": "-O0"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*.o")}

    first = build()
    assert set(first) == {"answer.cpp.o", "module.cpp.o"} and list(tmp_path.glob("specdec_kernels/_host.*"))
    assert build() == first
    (host / "answer.h").write_text("int answer();  // changed\n")
    second = build()
    assert second["answer.cpp.o"] > first["answer.cpp.o"] and second["module.cpp.o"] == first["module.cpp.o"]
