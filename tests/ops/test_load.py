"""Which libraries are loaded, and what is said where they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_testing import needs_kernels

import m2mkd
from m2mkd import ops
from m2mkd.ops import _load

PACKAGE = Path(m2mkd.__file__).resolve().parent

FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from m2mkd import ops
    import m2mkd.ops.reference
    logits = torch.randn(9, 4, requires_grad=True)
    weights, experts = ops.topk_gate(logits, 2)
    plan = ops.moe_plan(experts, 4, capacity=3)
    layer = [torch.randn(*size) for size in [(9, 6), (4, 8, 6), (4, 8), (4, 6, 8), (4, 6)]]
    out = ops.moe_mlp(layer[0], weights, plan, *layer[1:], "gelu")
    out.sum().backward()
assert logits.grad is not None and not hasattr(torch.ops.m2mkd, "moe_mlp")
assert ops.status()["kernels"] == {}
mine = [str(w.message) for w in caught if "m2mkd" in str(w.category) or "slow" in str(w.message)]
print(len(mine), mine[0])
"""


def test_without_the_extension_everything_runs_after_one_warning() -> None:
    environment = {**os.environ, "M2MKD_NO_EXTENSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 every op runs on slow PyTorch references")
    assert "unset it" in done.stdout


def test_a_library_never_built_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_load, "_installed_elsewhere", lambda name: None)
    reason = _load._load_library("_ops_cpu.so")
    assert "never built" in reason and "pip install --no-build-isolation -e ." in reason


def test_a_half_built_package_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_load, "_installed_elsewhere", lambda name: None)
    (tmp_path / "_C.abi.so").touch()
    assert "only in part (_C.abi.so" in _load._load_library("_ops_cuda.so")


def test_a_checkout_that_hides_an_installed_wheel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "m2mkd").mkdir(parents=True)
    library = tmp_path / "site" / "m2mkd" / "_ops_cpu.so"
    library.touch()

    class File:
        name = "_ops_cpu.so"

        def locate(self) -> Path:
            return library

    monkeypatch.setattr(_load.metadata, "files", lambda name: [File()])
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path / "checkout" / "m2mkd")
    reason = _load._load_library("_ops_cpu.so")
    assert str(tmp_path / "checkout") in reason and str(library.parent) in reason
    assert "run from another directory" in reason


def test_a_library_for_another_torch_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_ops_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(
        _load, "build_info", lambda: {"torch_built": "2.99.0+cu999", "python": "3.10.1"}
    )
    reason = _load._load_library("_ops_cpu.so")
    assert "built for torch 2.99.0+cu999 (Python 3.10.1)" in reason
    assert torch.__version__ in reason


def test_a_torch_older_than_the_target_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_ops_cpu.so").touch()
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_load, "_torch_release", lambda: (2, 9))
    assert "it needs 2.11 or later" in _load._load_library("_ops_cpu.so")


@needs_kernels
def test_status_lists_kernels_by_device_and_the_build() -> None:
    status = ops.status()
    assert "cpu" in status["kernels"]["moe_mlp"]
    assert status["build"]["torch_target"] == "2.11"
    assert status["build"]["version"] == m2mkd.__version__


@needs_kernels
def test_the_operator_libraries_need_no_python() -> None:
    for library in PACKAGE.glob("_ops_*.so"):
        done = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip("nm is not installed")
        symbols = {line.split()[-1] for line in done.stdout.splitlines()}
        assert not {s for s in symbols if s.startswith(("Py", "_Py"))}
        # Only torch's stable C interface, none of its C++ symbols.
        assert not {s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))}
