"""What `make` says on a machine that lacks something, and when it does set-up again.

Each test copies the Makefile to an empty folder, so the checkout's own .venv is never touched.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLD_COMPILER = """\
if [ "$1" = --version ]; then echo "g++ (GCC) 9.4.0"; exit 0; fi
exit 1
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder, with a space in its name, that holds the files set-up depends on."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    (folder / "csrc").mkdir()
    for name in ("Makefile", "scripts/check_toolchain.sh"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "csrc/ops.cpp"):
        (folder / name).touch()
    return folder


def _stub(folder: Path, body: str) -> str:
    """Writes a program that stands in for Python or the compiler; returns its path."""
    path = folder / "stub"
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    return str(path)


def _make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The variables of an outer make would reach this one.
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=checkout,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _only_line(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line a failed make has printed."""
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("target", ["demo", "test"])
def test_missing_python_is_one_line_that_names_it(checkout: Path, target: str) -> None:
    line = _only_line(_make(checkout, target, "PYTHON=no-such-python"))
    assert "Python 3.10 or newer is needed, but 'no-such-python' was not found" in line
    assert "PYTHON=/path/to/python3" in line


def test_old_python_is_one_line_with_its_version(checkout: Path, tmp_path: Path) -> None:
    python = _stub(tmp_path, "echo 3.8.18; exit 1")
    assert f"'{python}' is 3.8.18; install a newer one" in _only_line(
        _make(checkout, "demo", f"PYTHON={python}")
    )


def test_python_that_cannot_start_is_one_line(checkout: Path, tmp_path: Path) -> None:
    python = _stub(tmp_path, "echo 'command not found' >&2; exit 127")
    assert f"'{python}' is not runnable" in _only_line(_make(checkout, "demo", f"PYTHON={python}"))


def test_missing_venv_module_is_one_line_that_says_how_to_get_it(
    checkout: Path, tmp_path: Path
) -> None:
    body = f'case "$2" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"'
    line = _only_line(_make(checkout, "demo", f"PYTHON={_stub(tmp_path, body)}"))
    assert "lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv)" in line


def test_missing_python_headers_are_one_line_that_says_how_to_get_them(
    checkout: Path, tmp_path: Path
) -> None:
    body = f'case "$2" in *Python.h*) exit 1;; esac\nexec "{sys.executable}" "$@"'
    line = _only_line(_make(checkout, "demo", f"PYTHON={_stub(tmp_path, body)}"))
    assert "lacks its C headers; install them (Debian, Ubuntu: apt install python3-dev" in line


@pytest.mark.parametrize("target", ["demo", "test"])
def test_missing_compiler_is_one_line_that_names_it(checkout: Path, target: str) -> None:
    line = _only_line(_make(checkout, target, f"PYTHON={sys.executable}", "CXX=no-such-compiler"))
    assert "a C++20 compiler is needed, but 'no-such-compiler' was not found" in line
    assert "CXX=/path/to/g++" in line


def test_old_compiler_is_one_line_with_its_version(checkout: Path, tmp_path: Path) -> None:
    compiler = _stub(tmp_path, OLD_COMPILER)
    line = _only_line(_make(checkout, "demo", f"PYTHON={sys.executable}", f"CXX={compiler}"))
    assert f"'{compiler}' is g++ (GCC) 9.4.0; install g++ 11 or clang 14 or newer" in line


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "constraints.txt", "setup.py", "csrc/ops.cpp", "csrc/new.h"]
)
def test_setup_is_skipped_until_one_of_its_inputs_changes(checkout: Path, changed: str) -> None:
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    later = stamp.stat().st_mtime + 10
    os.utime(stamp, (later, later))
    assert _make(checkout, "-q", "setup").returncode == 0
    (checkout / changed).touch()
    os.utime(checkout / changed, (later + 10, later + 10))
    assert _make(checkout, "-q", "setup").returncode == 1


def test_plain_make_lists_the_targets(checkout: Path) -> None:
    listing = _make(checkout).stdout
    assert all(f"make {name} " in listing for name in ("demo", "test", "lint", "clean"))


def test_clean_keeps_the_runs(checkout: Path) -> None:
    for folder in (".venv", "build", "runs/quickstart", "m2mkd/__pycache__"):
        (checkout / folder).mkdir(parents=True)
    assert _make(checkout, "clean").returncode == 0
    left = {path.name for path in checkout.iterdir()}
    assert "runs" in left
    assert left.isdisjoint({".venv", "build"})
    assert not (checkout / "m2mkd" / "__pycache__").exists()
