"""What ptxas makes of the CUDA kernels, for one architecture; CI checks the others too."""

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """scripts/kernel_resources.py."""
    spec = importlib.util.spec_from_file_location(
        "kernel_resources", ROOT / "scripts" / "kernel_resources.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@needs_nvcc
@pytest.mark.slow
def test_kernels_take_no_more_than_the_committed_table_and_no_local_memory(
    tool: ModuleType,
) -> None:
    cubins = tool.compile_all(["9.0"], jobs=2)
    release, committed = tool.read_table()
    found = tool.measure(cubins)
    assert tool.check_table(found, committed, release == tool.nvcc_release()) == []
    assert tool.check_code(cubins) == []


def test_the_page_shows_the_committed_table(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, committed = tool.read_table()
    monkeypatch.setattr(tool, "nvcc_release", lambda: release)
    shown = tool.PAGE.read_text().partition(tool.MARK)[2]
    assert shown.strip() == tool.page_tables(committed).strip()


def test_spills_rises_and_unknown_kernels_are_faults(tool: ModuleType) -> None:
    _, committed = tool.read_table()
    kernel = "circuit_forward bf16 8x8x1 staged"
    before = committed[kernel]["9.0"]
    wide = replace(before, registers=before.registers + 9)
    spilled = replace(before, local=8)
    for one, fault in ((wide, "registers, was"), (spilled, "8 bytes of local memory")):
        found = {**committed, kernel: {"9.0": one}}
        (line,) = tool.check_table(found, committed, same_compiler=True)
        assert kernel in line and fault in line
    faults = tool.check_table({"new": {"9.0": before}}, {}, same_compiler=True)
    assert faults == ["new is not in the table; run --write"]


def test_atomics_local_memory_and_narrow_loads_are_faults(tool: ModuleType) -> None:
    kernel = "circuit_senders f32 4x16x1 staged"
    good = {"LDG.E.128", "LDS.128", "STG.E.128", "FFMA"}
    assert tool.faults_in_code(kernel, good) == []
    assert tool.faults_in_code(kernel, good - {"LDS.128"}) == [f"{kernel}: no LDS.128"]
    assert tool.faults_in_code(kernel, good | {"STL"}) == [f"{kernel}: local memory"]
    (fault,) = tool.faults_in_code(kernel, good | {"RED.E.ADD.F32.FTZ.RN.STRONG.GPU"})
    assert "an atomic" in fault


def test_occupancy_of_known_cases(tool: ModuleType) -> None:
    hopper = tool.ARCHS["9.0"]
    # 128 threads at 72 registers: 9 units of 256 a warp, 7 warps a scheduler, 7 blocks of 4 warps.
    assert tool.resident_warps(hopper, 128, 72, 0) == 28
    # Two blocks of 80 KB and their kilobyte fit 228 KB, three do not.
    assert tool.resident_warps(hopper, 512, 64, 80 << 10) == 32
    assert tool.resident_warps(tool.ARCHS["12.0"], 512, 64, 80 << 10) == 16
    assert tool.resident_warps(tool.ARCHS["12.0"], 512, 64, 160 << 10) == 0
