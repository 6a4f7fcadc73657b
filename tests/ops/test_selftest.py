"""The comparison that stands between CUDA kernels and their first use, run here on the CPU's."""

import pytest
import torch
from op_testing import needs_kernels

from m2mkd import ops
from m2mkd.ops import _selftest, reference


@needs_kernels
def test_the_cpu_kernels_pass() -> None:
    found = ops.selftest("cpu")
    assert len(found) == 16
    assert set(found.values()) == {"ok"}


@pytest.mark.gpu
def test_the_cuda_kernels_pass() -> None:
    assert set(ops.selftest("cuda").values()) == {"ok"}


@needs_kernels
def test_a_wrong_kernel_is_found_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "moe_gather", lambda x, plan: x[plan.token_of_M.long()] * 1.001)
    found = ops.selftest("cpu")
    assert "value differs by" in found["moe_gather float32"]
    assert found["topk_gate float32"] == "ok"
    monkeypatch.setattr(_selftest, "selftest", lambda device: found)
    with pytest.warns(ops.ExtensionWarning, match="moe_gather float32"):
        assert not _selftest._passes(torch.device("cpu"))


@needs_kernels
def test_a_device_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(_selftest, "EXTENSION", _selftest.EXTENSION.__class__(True, True, ""))
    monkeypatch.setattr(_selftest, "_passed", {})
    monkeypatch.setattr(_selftest, "_passes", lambda device: calls.append(device) or False)
    device = torch.device("cuda", 1)
    assert not _selftest.has_kernels(device)
    assert not _selftest.has_kernels(device)
    assert calls == [device]
