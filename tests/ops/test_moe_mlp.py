"""The fused expert layer: values, every gradient, repeatability, tracing and autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    PROBLEMS,
    Problem,
    assert_near,
    check_against,
    needs_kernels,
)
from torch import Tensor

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops import reference


def apply(module: object, plan: ops.MoEPlan, activation: str, inputs: list[Tensor]) -> Tensor:
    """moe_mlp of `module` on x, weights and the four parameters."""
    x, weights, *parameters = inputs
    return module.moe_mlp(  # type: ignore[attr-defined,no-any-return]
        x, weights, plan, *parameters, activation
    )


def test_a_layer_small_enough_to_check_by_eye() -> None:
    experts = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    x = torch.tensor([[1.0], [-1.0]])
    fc1_weight = torch.tensor([[[1.0], [-1.0]], [[2.0], [0.0]]])  # two hidden units
    fc1_bias = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    fc2_weight = torch.tensor([[[1.0, 10.0]], [[1.0, 100.0]]])
    fc2_bias = torch.tensor([[0.5], [0.0]])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plan = ops.moe_plan(experts, 2)
    out = ops.moe_mlp(x, weights, plan, fc1_weight, fc1_bias, fc2_weight, fc2_bias, "relu")
    # x = 1: expert 0 gives 1 + 0.5, expert 1 gives 2 + 100. x = -1: 10 + 0.5 and 0 + 100.
    assert out.tolist() == [[1 * 1.5 + 2 * 102], [3 * 100 + 4 * 10.5]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_values_and_every_gradient_equal_the_reference(
    problem: Problem, dtype: torch.dtype, device: str
) -> None:
    plan = problem.plan(device)
    check_against(
        lambda *inputs: apply(ops, plan, "gelu", list(inputs)),
        lambda *inputs: apply(reference, plan, "gelu", list(inputs)),
        list(problem.layer(dtype, device)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_reference_with_and_without_biases(
    activation: str, bias: bool, dtype: torch.dtype, device: str
) -> None:
    problem = Problem(40, 12, 37, 3, 2)
    plan = problem.plan(device)
    check_against(
        lambda *inputs: apply(ops, plan, activation, list(inputs)),
        lambda *inputs: apply(reference, plan, activation, list(inputs)),
        list(problem.layer(dtype, device, bias)),
    )


def test_experts_of_several_blocks_equal_the_reference() -> None:
    # One expert takes 2500 rows, more than a block of the forward or of the backward pass.
    problem = Problem(2500, 8, 12, 3, 2, routing="one")
    plan = problem.plan()
    check_against(
        lambda *inputs: apply(ops, plan, "gelu", list(inputs)),
        lambda *inputs: apply(reference, plan, "gelu", list(inputs)),
        list(problem.layer(torch.float32)),
    )


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(
        st.integers(0, 20),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(2, 5),
        st.integers(1, 2),
    ),
    capacity=st.none() | st.integers(1, 9),
)
def test_any_small_shape_equals_the_reference(
    sizes: tuple[int, int, int, int, int], capacity: int | None
) -> None:
    problem = Problem(*sizes, capacity=capacity)
    plan = problem.plan()
    check_against(
        lambda *inputs: apply(ops, plan, "silu", list(inputs)),
        lambda *inputs: apply(reference, plan, "silu", list(inputs)),
        list(problem.layer(torch.float64)),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_gradcheck(activation: str) -> None:
    problem = Problem(5, 3, 4, 3, 2, capacity=3)
    plan = problem.plan()
    assert torch.autograd.gradcheck(
        lambda *inputs: apply(ops, plan, activation, list(inputs)), problem.layer(torch.float64)
    )


@pytest.mark.parametrize("frozen", ["x", "gate", "experts", "fc1", "fc2"])
def test_gradients_of_some_inputs_do_not_depend_on_the_others_being_frozen(frozen: str) -> None:
    problem = Problem(30, 6, 10, 4, 2)
    plan = problem.plan()
    still = {"x": [0], "gate": [1], "experts": [2, 3, 4, 5], "fc1": [2, 3], "fc2": [4, 5]}[frozen]
    inputs = problem.layer(torch.float64)
    for i in still:
        inputs[i].requires_grad_(False)
    check_against(
        lambda *inputs: apply(ops, plan, "gelu", list(inputs)),
        lambda *inputs: apply(reference, plan, "gelu", list(inputs)),
        list(inputs),
    )


def test_a_token_may_choose_the_same_expert_twice() -> None:
    problem = Problem(600, 8, 12, 2, 2)
    plan = ops.moe_plan(torch.zeros(600, 2, dtype=torch.int32), 2)
    check_against(
        lambda *inputs: apply(ops, plan, "gelu", list(inputs)),
        lambda *inputs: apply(reference, plan, "gelu", list(inputs)),
        list(problem.layer(torch.float64)),
    )


def test_several_threads_give_what_one_gives() -> None:
    problem = Problem(900, 32, 48, 4, 2)
    plan = problem.plan()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check_against(
            lambda *inputs: apply(ops, plan, "gelu", list(inputs)),
            lambda *inputs: apply(reference, plan, "gelu", list(inputs)),
            list(problem.layer(torch.float64)),
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_for_bit(device: str) -> None:
    problem = Problem(700, 32, 48, 4, 2)
    inputs = problem.layer(torch.float32, device)
    plan = problem.plan(device)

    def run() -> list[Tensor]:
        out = apply(ops, plan, "gelu", inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_inference_gives_what_training_gives() -> None:
    problem = Problem(50, 8, 12, 4, 2)
    inputs, plan = problem.layer(torch.float32), problem.plan()
    trained = apply(ops, plan, "gelu", inputs)
    with torch.no_grad():
        assert torch.equal(apply(ops, plan, "gelu", inputs), trained)


@needs_kernels
def test_backward_recomputes_what_was_not_saved() -> None:
    problem = Problem(50, 8, 12, 4, 2)
    plan = problem.plan()
    x, weights, *parameters = (t.detach() for t in problem.layer(torch.float64))
    fixed = (x, weights, *plan, *parameters, "gelu")
    _, saved = torch.ops.m2mkd.moe_mlp(*fixed, True)
    grad = torch.randn_like(x)
    kept = torch.ops.m2mkd.moe_mlp_backward(grad, saved, *fixed, True, True, True)
    again = torch.ops.m2mkd.moe_mlp_backward(grad, saved[:0], *fixed, True, True, True)
    for a, b in zip(kept, again, strict=True):
        assert_near(a, b)


def test_non_contiguous_inputs_and_upstream_gradients_are_accepted() -> None:
    problem = Problem(20, 6, 10, 4, 2)
    plan = problem.plan()
    inputs = problem.layer(torch.float64)
    inputs = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    found = torch.autograd.grad(apply(ops, plan, "gelu", inputs).sum(), inputs)
    expected = torch.autograd.grad(apply(reference, plan, "gelu", inputs).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    problem = Problem(30, 16, 32, 4, 2)
    plan = problem.plan()
    inputs = problem.layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply(ops, plan, "gelu", inputs)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    exact = apply(reference, plan, "gelu", inputs)
    assert_near(out, exact.bfloat16())


def test_mismatched_parameters_are_refused_with_the_values() -> None:
    problem = Problem(5, 4, 6, 3, 2)
    plan = problem.plan()
    x, weights, w1, b1, w2, b2 = problem.layer(torch.float32)
    with pytest.raises(ShapeError, match="swish"):
        ops.moe_mlp(x, weights, plan, w1, b1, w2, b2, "swish")
    with pytest.raises(ShapeError, match=r"fc2_weight has shape \(3, 6, 4\)"):
        ops.moe_mlp(x, weights, plan, w1, b1, w1, b2, "gelu")
    with pytest.raises(ShapeError, match="fc1_bias has shape"):
        ops.moe_mlp(x, weights, plan, w1, b2, w2, b2, "gelu")
    with pytest.raises(ShapeError, match="number of offsets is 4"):
        ops.moe_mlp(x, weights, plan, w1[:2], b1[:2], w2[:2], b2[:2], "gelu")
    with pytest.raises(ShapeError, match=r"fc1_weight is torch\.float64"):
        ops.moe_mlp(x, weights, plan, w1.double(), b1, w2, b2, "gelu")
