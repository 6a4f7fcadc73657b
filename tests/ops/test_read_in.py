"""Folded read-in attention against the literal form."""

import pytest
import torch
from hypothesis import strategies as st
from op_testing import DifferentiableOpTests, Inputs
from torch import Tensor

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops import reference


def arguments(
    batch: int = 2,
    heads: int = 3,
    latents: int = 4,
    tokens: int = 5,
    head_width: int = 6,
    width: int = 7,
    scale_per_example: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """q, x, key_weight, value_weight, key_scale, value_scale, value_bias; all want gradients."""
    generator = torch.Generator().manual_seed(0)
    scale = (batch, latents, width) if scale_per_example else (latents, width)
    sizes = [(batch, heads, latents, head_width), (batch, tokens, width)]
    sizes += [(heads * head_width, width)] * 2 + [scale] * 2 + [(heads * head_width,)]
    drawn: list[Tensor | None] = [
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]
    return drawn if bias else [*drawn[:-1], None]


NAMES = [
    *("q_BHUK", "x_BVD", "key_weight", "value_weight"),
    *("key_scale_UD", "value_scale_UD", "value_bias"),
]


class TestReadIn(DifferentiableOpTests):
    """Problems are the sizes of `arguments`, and its two flags."""

    name = "read_in_attention"
    # Half types round at other places than the literal form; their own test is below.
    dtypes = (torch.float64, torch.float32)
    problems = (
        pytest.param((2, 3, 4, 5, 6, 7, False, True), id="odd sizes"),
        pytest.param((3, 2, 5, 9, 8, 16, True, True), id="scales per example"),
        pytest.param((2, 1, 33, 65, 16, 24, False, False), id="no bias"),
        pytest.param((0, 3, 4, 5, 6, 7, True, True), id="no examples"),
        pytest.param((2, 3, 0, 5, 6, 7, False, True), id="no latents"),
        pytest.param((1, 1, 1, 1, 1, 1, False, True), id="all sizes one"),
    )
    small = (2, 2, 2, 3, 2, 3, True, True)
    compiled = ((2, 3, 4, 5, 6, 7, False, True), (3, 3, 4, 6, 6, 7, False, True))
    any_problem = st.tuples(
        *(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 6)),
        *(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans()),
    )

    @staticmethod
    def inputs(problem: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        drawn = arguments(*problem, dtype=dtype)  # type: ignore[misc, arg-type]
        moved = (None if t is None else t.detach().to(device).requires_grad_() for t in drawn)
        return dict(zip(NAMES, moved, strict=True))


@pytest.mark.parametrize("scale_per_example", [True, False])
def test_examples_done_a_few_at_a_time_give_the_same(
    monkeypatch: pytest.MonkeyPatch, scale_per_example: bool
) -> None:
    inputs = arguments(batch=5, scale_per_example=scale_per_example)
    whole = ops.read_in_attention(*inputs)
    monkeypatch.setattr("m2mkd.ops.read_in._CACHE_BYTES", 2 * 3 * 4 * 7 * 8)
    torch.testing.assert_close(ops.read_in_attention(*inputs), whole)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
)
def test_rounding_stays_within_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    inputs = arguments(2, 6, 16, 64, 16, 96, dtype=dtype)
    weights = [t.detach() / 96**0.5 if t is not None and t.dim() == 2 else t for t in inputs]
    exact = [None if t is None else t.detach().double() for t in weights]
    found = ops.read_in_attention(*weights)  # type: ignore[arg-type]
    expected = reference.read_in_attention(*exact)  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_memory_does_not_hold_a_key_for_every_pair() -> None:
    batch, heads, latents, tokens, width = 2, 4, 32, 64, 128
    inputs = [
        t.detach() for t in arguments(batch, heads, latents, tokens, 32, width) if t is not None
    ]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch(), torch.no_grad():
        ops.read_in_attention(*inputs)
    assert largest <= batch * heads * latents * width
    assert largest < batch * latents * tokens * width


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (0, torch.rand(2, 3, 4, 0).double(), "have width 0"),
        (1, torch.rand(3, 5, 7).double(), "B of x is 3, but B of q is 2"),
        (1, torch.rand(2, 0, 7).double(), "no tokens to attend to"),
        (1, torch.rand(2, 5, 7), "x is torch.float32, but q is torch.float64"),
        (2, torch.rand(17, 7).double(), r"key_weight has shape \(17, 7\); it must be \(18, 7\)"),
        (4, torch.rand(3, 7).double(), r"key_scale has shape \(3, 7\); it must be \(4, 7\) or"),
        (6, torch.rand(17).double(), r"value_bias has shape \(17,\); it must be \(18,\)"),
        (1, torch.rand(2, 5, 7, device="meta").double(), "x is on meta, but q is on cpu"),
    ],
)
def test_impossible_arguments_are_named(index: int, tensor: Tensor, message: str) -> None:
    inputs = arguments()
    inputs[index] = tensor
    with pytest.raises(ShapeError, match=message):
        ops.read_in_attention(*inputs)  # type: ignore[arg-type]
