"""Shared by the op tests: random problems, tolerances, and comparison with the references."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from m2mkd import ops
from m2mkd.ops._load import EXTENSION

needs_kernels = pytest.mark.skipif(not EXTENSION.cpu, reason="the extension is not built")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu"]

# Relative to the largest entry. GEMMs over a few hundred terms in another order differ by some
# units in the last place; half types round every stage, the reference at other places.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


def assert_near(found: Tensor, expected: Tensor, what: str = "values") -> None:
    """Compares in units of the largest expected entry, at the tolerance of its dtype."""
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if expected.numel() == 0:
        return
    exact = expected.detach().double()
    difference = float((found.detach().double() - exact).abs().max())
    limit = TOLERANCE[expected.dtype] * max(1e-3, float(exact.abs().max()))
    assert difference <= limit, f"{what}: {difference:.3e} > {limit:.3e}"


@dataclass
class Problem:
    """Sizes and a seed, from which all tensors of an expert layer are drawn.

    routing: random; one (expert 0 takes every first choice); empty (expert 0 takes none).
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    routing: str = "random"
    capacity: int | None = None

    def experts_TK(self, device: str = "cpu") -> Tensor:
        """Distinct experts for each token."""
        generator = torch.Generator().manual_seed(7)
        scores = torch.rand(self.tokens, self.experts, generator=generator)
        if self.routing == "one":
            scores[:, 0] = 2.0
        if self.routing == "empty":
            scores[:, 0] = -1.0
        return scores.argsort(dim=1, descending=True)[:, : self.k].to(device, torch.int32)

    def plan(self, device: str = "cpu") -> ops.MoEPlan:
        """The plan of these choices."""
        return ops.moe_plan(self.experts_TK(device), self.experts, self.capacity)

    def draw(self, *sizes: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
        """Normal values, the same for every dtype up to rounding; a leaf that wants gradients."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    def layer(self, dtype: torch.dtype, device: str = "cpu", bias: bool = True) -> list[Tensor]:
        """x, weights, fc1_weight, fc1_bias, fc2_weight, fc2_bias; None for biases not wanted."""
        t, d, h, e = self.tokens, self.width, self.hidden, self.experts
        sizes = [(t, d), (t, self.k), (e, h, d), (e, h), (e, d, h), (e, d)]
        tensors = [
            self.draw(*size, dtype=dtype, device=device, seed=seed)
            for seed, size in enumerate(sizes)
        ]
        if not bias:
            tensors[3] = tensors[5] = None  # type: ignore[call-overload]
        return tensors


PROBLEMS = [
    pytest.param(Problem(0, 8, 16, 4, 2), id="no tokens"),
    pytest.param(Problem(1, 1, 1, 1, 1), id="all sizes one"),
    pytest.param(Problem(1, 8, 12, 5, 3), id="one token"),
    pytest.param(Problem(33, 7, 13, 4, 2), id="odd widths"),
    pytest.param(Problem(65, 24, 40, 6, 6), id="every expert chosen"),
    pytest.param(Problem(63, 16, 20, 4, 2, routing="one"), id="one expert takes all"),
    pytest.param(Problem(64, 16, 20, 4, 2, routing="empty"), id="an empty expert"),
    pytest.param(Problem(70, 16, 20, 5, 2, capacity=11), id="choices dropped"),
    pytest.param(Problem(70, 16, 20, 5, 2, routing="one", capacity=1), id="nearly all dropped"),
]


def check_against(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor | None]
) -> None:
    """Compares values and the gradient of every floating input."""
    found, expected = kernel(*inputs), reference(*inputs)
    assert_near(found, expected)
    generator = torch.Generator().manual_seed(99)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    upstream = upstream.to(expected.device, expected.dtype)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    found_grads = torch.autograd.grad(found, leaves, upstream)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    for i, (a, b) in enumerate(zip(found_grads, expected_grads, strict=True)):
        assert_near(a, b, f"gradient {i}")
