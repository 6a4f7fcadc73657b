"""The vectorised float activations against float64, over a dense sweep and at the extremes."""

import pytest
import torch
from op_testing import needs_kernels
from torch import Tensor

from m2mkd import ops
from m2mkd.ops import reference
from m2mkd.ops._checks import ACTIVATIONS

pytestmark = needs_kernels

# In units of the last place of the larger of result and input: errors of erf, exp and tanh, and
# the rounding of their arguments.
UNITS = 2.5
EPSILON = torch.finfo(torch.float32).eps


def through_layer(module: object, z: Tensor, activation: str) -> Tensor:
    """act(z) by way of an expert layer with unit weights and one expert."""
    experts = torch.zeros(z.shape[0], 1, dtype=torch.int32)
    plan = module.moe_plan(experts, 1)  # type: ignore[attr-defined]
    eye = torch.eye(z.shape[1], dtype=z.dtype)[None]
    ones = torch.ones(z.shape[0], 1, dtype=z.dtype)
    return module.moe_mlp(  # type: ignore[attr-defined,no-any-return]
        z, ones, plan, eye, None, eye, None, activation
    )


def sweep() -> Tensor:
    """Every scale from tiny to where all activations are flat, both signs; [rows, 1]."""
    dense = torch.linspace(-20, 20, 40001)
    scales = torch.logspace(-30, 2, 2001)
    return torch.cat([dense, scales, -scales, torch.zeros(1)])[:, None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_float32_rounding_away_from_float64(activation: str) -> None:
    z = sweep()
    found = through_layer(ops, z, activation).double()
    exact = through_layer(reference, z.double(), activation)
    unit = EPSILON * torch.maximum(exact.abs(), z.double().abs()) + 1e-37
    assert ((found - exact).abs() <= UNITS * unit).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_float32_rounding_away_from_float64(activation: str) -> None:
    z = sweep()
    z = z[z.abs() > 0][:, None].requires_grad_()
    (found,) = torch.autograd.grad(through_layer(ops, z, activation).sum(), z)
    wide = z.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(through_layer(reference, wide, activation).sum(), wide)
    # Slopes are differences of terms as large as 1, or as |z| in the middle of gelu_tanh.
    assert ((found.double() - exact).abs() <= 8 * EPSILON).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_flat_and_nan_stays_nan(activation: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[1e30], [1e4], [-1e4], [-1e30], [torch.inf], [torch.nan]], dtype=dtype)
    z.requires_grad_()
    out = through_layer(ops, z, activation)
    assert torch.equal(out[:2], z[:2])
    assert out[2:4].abs().max() < 1e-25
    assert out[4] == torch.inf
    assert out[5].isnan()
    (slope,) = torch.autograd.grad(out[:4].sum(), z)
    assert slope[:2].sub(1).abs().max() < 1e-6
    assert slope[2:4].abs().max() < 1e-25


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_is_computed_in_float64(activation: str) -> None:
    z = torch.linspace(-6, 6, 1001, dtype=torch.float64)[:, None]
    found, exact = (through_layer(module, z, activation) for module in (ops, reference))
    assert (found - exact).abs().max() < 1e-15 * 16
