"""Modulated linear layers keep their inputs alone, and derive what they compute."""

import pytest
import torch
import torch.nn.functional as F

from m2mkd.nn.modulated import ACTIVATIONS, Normed, activate, modulated_linear

EPS = 0.1


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


@pytest.mark.parametrize("has_bias", [True, False])
def test_factors_of_the_outputs_are_derived_too(has_bias: bool) -> None:
    x, scale, weight, bias = tensors("gelu", dtype=torch.float64)
    factors = torch.randn(5, dtype=torch.float64, requires_grad=True)
    leaves = (x, scale, weight, bias, factors) if has_bias else (x, scale, weight, factors)

    def run(*args: torch.Tensor) -> torch.Tensor:
        return modulated_linear(*args[:3], args[3] if has_bias else None, "gelu", args[-1])

    expected = F.linear(F.gelu(x) * scale, weight, bias if has_bias else None) * factors
    torch.testing.assert_close(run(*leaves), expected)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_is_had_alone(wanted: int) -> None:
    leaves = [*tensors("none"), torch.randn(5, requires_grad=True)]
    x, scale, weight, bias, factors = leaves
    expected = F.linear(x * scale, weight, bias) * factors
    gradient = torch.autograd.grad(expected.square().sum(), leaves[wanted])[0]
    frozen = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
    loss = modulated_linear(*frozen[:4], "none", frozen[4]).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[wanted])[0], gradient)


def normed(*sizes: int, affine: bool = True) -> tuple[list[torch.Tensor], Normed]:
    """A norm's input, factors and biases, and its output."""
    parts = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (sizes, sizes[-1:], sizes[-1:])
    ]
    source, weight, bias = parts
    if not affine:
        return parts[:1], Normed(F.layer_norm(source, sizes[-1:], eps=EPS), source, None, None, EPS)
    out = F.layer_norm(source, sizes[-1:], weight, bias, EPS)
    return parts, Normed(out, source, weight, bias, EPS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_norms_before_the_layer_are_derived_as_if_their_outputs_were_kept(
    activation: str, affine: bool
) -> None:
    leaves, x = normed(2, 7, 8 if activation == "geglu" else 4, affine=affine)
    scale_leaves, scale = normed(3, 4, affine=affine)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    leaves += [*scale_leaves, weight]
    x = x.last(3)

    def derivatives(loss: torch.Tensor) -> list[torch.Tensor]:
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(grad.sin().sum() for grad in first)
        return [*first, *torch.autograd.grad(total, leaves, retain_graph=True)]

    expected = F.linear(activate(x.out, activation) * scale.out, weight)
    found = modulated_linear(x, scale, weight, None, activation)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        derivatives(found.square().sum()), derivatives(expected.square().sum())
    )


def test_of_a_normed_input_what_the_norm_keeps_is_kept() -> None:
    (source, *_), x = normed(2, 3, 4)
    scale_leaves, scale = normed(3, 4)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        modulated_linear(x, scale, weight, None)
    assert {source.data_ptr(), scale_leaves[0].data_ptr()} < set(kept)
    assert not {x.out.data_ptr(), scale.out.data_ptr()} & set(kept)


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


def test_under_autocast_a_norm_is_repeated_as_it_was_computed() -> None:
    norm = torch.nn.LayerNorm(4)
    weight, scale = torch.randn(5, 4, requires_grad=True), torch.ones(3, 4)

    def gradients(wrapped: bool) -> tuple[torch.Tensor, ...]:
        source = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        source = source.to(torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            x = Normed.by(norm, source)
            out = modulated_linear(x if wrapped else x.out, scale, weight, None)
        return torch.autograd.grad(out.float().square().sum(), (source, weight, norm.weight))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)
