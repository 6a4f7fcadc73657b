"""The comparison that stands between CUDA kernels and their first use, run here on the CPU's."""

import json
from pathlib import Path

import pytest
import torch
from op_testing import REGISTERED, needs_kernels
from torch._subclasses import FakeTensorMode

from m2mkd import ops
from m2mkd.ops import _selftest, reference

CARD = torch.device("cuda", 1)


@needs_kernels
def test_the_cpu_kernels_pass_in_every_dtype() -> None:
    found = ops.selftest("cpu")
    kernels = {name for name, registered in REGISTERED.items() if registered}
    dtypes = {"float64", "float32", "bfloat16", "float16"}
    assert {tuple(name.split()) for name in found} == {(k, d) for k in kernels for d in dtypes}
    assert {name: finding.problem for name, finding in found.items() if finding.problem} == {}
    assert 0 < found["moe_mlp float32"].error < 1e-5 < found["moe_mlp bfloat16"].error


@pytest.mark.gpu
def test_the_cuda_kernels_pass() -> None:
    assert {f for f in ops.selftest("cuda").values() if f.problem} == set()


@needs_kernels
def test_the_surroundings_of_the_first_use_do_not_matter() -> None:
    expected = ops.selftest("cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            found = ops.selftest("cpu")
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == expected


@needs_kernels
def test_a_wrong_kernel_is_found_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "moe_gather", lambda x, plan: x[plan.token_of_M.long()] * 1.001)
    found = ops.selftest("cpu")
    assert "value differs by" in found["moe_gather float32"].problem
    assert found["moe_gather float32"].error == pytest.approx(1e-3, rel=1e-2)
    assert found["topk_gate float32"].problem == ""
    monkeypatch.setattr(_selftest, "selftest", lambda device: found)
    with pytest.warns(ops.ExtensionWarning, match="moe_gather float32"):
        assert not _selftest._passes(torch.device("cpu"))


@needs_kernels
def test_a_kernel_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(reference, "moe_combine", broken)
    assert "no kernel image" in ops.selftest("cpu")["moe_combine float32"].problem


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.device]:
    """Pretends that CUDA kernels are loaded; lists the devices that were tested."""
    devices: list[torch.device] = []
    facts = {"device": "a card", "torch": "2.14", "kernels": "abc"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_selftest, "EXTENSION", _selftest.EXTENSION.__class__(True, True, ""))
    monkeypatch.setattr(_selftest, "_verdicts", {})
    monkeypatch.setattr(_selftest, "_facts", lambda device: facts)
    monkeypatch.setattr(_selftest, "_passes", lambda device: devices.append(device) or True)
    return devices


def test_a_device_is_tested_once_and_its_passing_is_kept_on_disk(
    tested: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _selftest.has_kernels(CARD) and _selftest.has_kernels(CARD)
    assert tested == [CARD]
    (record,) = tmp_path.rglob("*.json")
    assert json.loads(record.read_text())["device"] == "a card"
    _selftest._verdicts.clear()  # as in another process
    assert _selftest.has_kernels(CARD)
    assert tested == [CARD]
    _selftest._verdicts.clear()
    monkeypatch.setattr(_selftest, "_facts", lambda device: {"kernels": "another build"})
    assert _selftest.has_kernels(CARD)
    assert tested == [CARD, CARD]


def test_a_failure_is_not_kept_on_disk(
    tested: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_selftest, "_passes", lambda device: bool(tested.append(device)))
    assert not _selftest.has_kernels(CARD) and not _selftest.has_kernels(CARD)
    assert tested == [CARD] and list(tmp_path.iterdir()) == []
    _selftest._verdicts.clear()
    assert not _selftest.has_kernels(CARD)
    assert tested == [CARD, CARD]


def test_a_folder_that_cannot_be_written_only_means_testing_again(
    tested: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _selftest.has_kernels(CARD)
    assert tested == [CARD]


def test_a_first_use_while_compiling_is_tested_too(tested: list[torch.device]) -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _selftest.has_kernels(CARD) else x

    x = torch.zeros(2)
    assert torch.compile(function, backend="eager", fullgraph=True)(x).tolist() == [1, 1]
    assert tested == [CARD]


def test_tracing_with_fake_tensors_leaves_the_test_for_later(tested: list[torch.device]) -> None:
    with FakeTensorMode():
        assert _selftest.has_kernels(CARD)
    assert tested == []
    assert _selftest.has_kernels(CARD)
    assert tested == [CARD]
