"""The distribution: what a clone and a wheel contain, and what README claims."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import specdec_kernels as sk

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".yaml", ".yml", ".cfg", ".txt", ".in", ""}
# Written so that they do not match themselves.
MACHINE = re.compile(r"/[w]ork/|/[f]arm/|/[t]mp/|/[r]oot/|/[h]ome/|\.\./[s]hared")
REGISTRY = re.compile(r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|anaconda[.]org|ghcr[.]io")


def repository() -> list[Path]:
    """The files of this tree: what git tracks or would, without git all but what is built or cached."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0")[:-1] if (path := ROOT / name).is_file()]
    built = {"build", "dist", "out", "peers", "__pycache__"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(p in built or (p.startswith(".") and p != ".ci") for p in path.relative_to(ROOT).parts[:-1])
    ]


def texts():
    for path in repository():
        if path.suffix in SOURCES and path.name != "LICENSE" and "data" not in path.relative_to(ROOT).parts:
            yield path.relative_to(ROOT), path.read_text()


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_no_file_names_a_machine_or_a_registry():
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line) or REGISTRY.search(line)
    ]
    assert not found, "\n".join(found)


def test_repository_holds_what_is_promised():
    names = {path.relative_to(ROOT).as_posix() for path in repository()}
    promised = {
        "LICENSE",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "Makefile",
        ".ci/run",
        "specdec_kernels/py.typed",
        "python/specdec_loop/py.typed",
    }
    assert promised <= names
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert f"## [{sk.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: "loop" if "specdec_loop" in block else "ops")
def test_readme_examples_run(block, capsys):
    if "specdec_loop" in block:
        pytest.importorskip("transformers", reason="the loop's extra is not installed")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_table_matches_the_backends():
    backends = sk.backends.table()
    text = (ROOT / "README.md").read_text()
    header, rows = text.split("## What runs where", 1)[1].split("|---|", 1)
    columns = [cell.strip() for cell in header.strip().splitlines()[-1].split("|")[2:-1]]
    assert columns == list(backends)
    seen = []
    for row in rows.splitlines()[1:]:
        if not row.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        op = name.strip("`")
        seen.append(op)
        for backend, cell in zip(columns, cells, strict=True):
            assert (cell != "-") == (op in backends[backend]["ops"]), f"{op} on {backend}: README says {cell!r}"
    assert sorted(seen) == backends["reference"]["ops"]


def test_build_without_torch_says_what_to_type():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'bdist_wheel']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "pip install --no-build-isolation ." in sentence


@pytest.mark.full
def test_wheel(tmp_path):
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path)]
    pip = [sys.executable, "-m", "pip"]
    made = subprocess.run([*pip, *build, str(ROOT)], capture_output=True, text=True, timeout=1200)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "specdec_kernels/py.typed",
        "specdec_kernels/reference/verify.py",
        "specdec_loop/py.typed",
        "specdec_loop/tiny/data/target/model.safetensors",
        "specdec_loop/tiny/data/tokenizer.json",
    ):
        assert wanted in names
    assert not [n for n in names if n.startswith(("csrc", "tests", "bench", "python")) or n.endswith((".cpp", ".cu"))]
    target = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import specdec_kernels as sk; print(sk.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == str(target / "specdec_kernels" / "__init__.py"), found.stderr
