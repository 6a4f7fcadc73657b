"""Modulated linear layers keep their inputs alone, and derive what they compute."""

import pytest
import torch
import torch.nn.functional as F

from m2mkd.nn.modulated import ACTIVATIONS, activate, modulated_linear


def tensors(activation: str, rows: int = 3, **options: object) -> list[torch.Tensor]:
    inputs = {"geglu": (2, 3, 8), "heads": (2, 2, 3, 2)}.get(activation, (2, 3, 4))
    shapes = [inputs, (rows, 4), (5, 4), (5,)]
    return [torch.randn(shape, requires_grad=True, **options) for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_values_and_derivatives_are_those_of_the_formula(activation: str, rows: int) -> None:
    x, scale, weight, bias = tensors(activation, rows, dtype=torch.float64)
    expected = F.linear(activate(x, activation) * scale, weight, bias)
    torch.testing.assert_close(modulated_linear(x, scale, weight, bias, activation), expected)
    assert torch.autograd.gradcheck(
        lambda *args: modulated_linear(*args, activation), (x, scale, weight, bias)
    )
    assert torch.autograd.gradgradcheck(
        lambda *args: modulated_linear(*args, activation), (x, scale, weight, bias)
    )


def test_frozen_weights_get_no_gradient_and_inputs_still_do() -> None:
    x, scale, weight, _ = tensors("none")
    modulated_linear(x, scale, weight.detach(), None).sum().backward()
    assert x.grad is not None and scale.grad is not None and weight.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_inputs_alone_are_kept_for_the_backward_pass(activation: str) -> None:
    inputs = tensors(activation)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        modulated_linear(*inputs, activation)
    assert sorted(kept) == sorted(t.data_ptr() for t in inputs[:3])


def test_an_autocast_region_has_its_dtype_in_both_directions() -> None:
    x, scale, weight, bias = tensors("geglu")
    with torch.autocast("cpu", torch.bfloat16):
        out = modulated_linear(x, scale, weight, bias, "geglu")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, scale, weight, bias))
    exact = modulated_linear(x, scale, weight, bias, "geglu")
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
