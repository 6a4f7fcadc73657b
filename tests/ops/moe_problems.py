"""Random mixture-of-experts layers for the op tests.

Letters: T tokens, D width, H hidden width, E experts, K choices per token.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from op_testing import draw
from torch import Tensor

from m2mkd import ops
from m2mkd.ops._checks import ACTIVATIONS


@dataclass(frozen=True)
class Problem:
    """Sizes from which all tensors of an expert layer are drawn.

    routing: random; one (expert 0 takes every first choice); empty (expert 0 takes none).
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    routing: str = "random"
    capacity: int | None = None
    bias: bool = True
    activation: str = "gelu"

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

    def x_TD(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Tokens."""
        return draw(self.tokens, self.width, dtype=dtype, device=device, seed=0)

    def rows_MD(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Rows for the plan, whatever token they came from."""
        num_rows = self.plan().token_of_M.shape[0]
        return draw(num_rows, self.width, dtype=dtype, device=device, seed=1)

    def weights_TK(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Combine weights, of either sign."""
        return draw(self.tokens, self.k, dtype=dtype, device=device, seed=2)

    def parameters(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
        """fc1_weight, fc1_bias, fc2_weight, fc2_bias; None for biases not wanted."""
        d, h, e = self.width, self.hidden, self.experts
        sizes = [(e, h, d), (e, h), (e, d, h), (e, d)]
        return [
            draw(*size, dtype=dtype, device=device, seed=seed)
            if self.bias or len(size) == 3
            else None
            for seed, size in enumerate(sizes, start=3)
        ]

    def layer(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """x, weights and the four parameters."""
        tensors = [self.x_TD(dtype, device), self.weights_TK(dtype, device)]
        return [*tensors, *self.parameters(dtype, device)]  # type: ignore[list-item]


PROBLEMS = [
    pytest.param(Problem(0, 8, 16, 4, 2), id="no tokens"),
    pytest.param(Problem(5, 0, 3, 4, 2), id="no width"),
    pytest.param(Problem(1, 1, 1, 1, 1), id="all sizes one"),
    pytest.param(Problem(1, 8, 12, 5, 3), id="one token"),
    pytest.param(Problem(33, 7, 13, 4, 2), id="odd widths"),
    pytest.param(Problem(33, 7, 13, 4, 2, bias=False), id="odd widths, no bias"),
    pytest.param(Problem(65, 24, 40, 6, 6), id="every expert chosen"),
    pytest.param(Problem(63, 16, 20, 4, 2, routing="one"), id="one expert takes all"),
    pytest.param(Problem(64, 16, 20, 4, 2, routing="empty"), id="an empty expert"),
    pytest.param(Problem(70, 16, 20, 5, 2, capacity=11), id="choices dropped"),
    pytest.param(
        Problem(70, 16, 20, 5, 2, routing="one", capacity=1, bias=False), id="nearly all dropped"
    ),
]
SMALL = Problem(5, 3, 4, 3, 2, capacity=3)
COMPILED = [Problem(12, 8, 12, 4, 2), Problem(17, 8, 12, 4, 2)]


def any_problem() -> st.SearchStrategy[Problem]:
    """Small layers of any shape; K is at most the smallest number of experts."""
    return st.builds(
        Problem,
        tokens=st.integers(0, 20),
        width=st.integers(1, 9),
        hidden=st.integers(1, 9),
        experts=st.integers(2, 5),
        k=st.integers(1, 2),
        routing=st.sampled_from(["random", "one", "empty"]),
        capacity=st.none() | st.integers(1, 9),
        bias=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
    )
