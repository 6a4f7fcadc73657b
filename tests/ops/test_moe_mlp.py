"""The fused expert layer: values, every gradient, repeatability, tracing and autocast."""

import pytest
import torch
from moe_problems import COMPILED, PROBLEMS, SMALL, Problem, any_problem
from op_testing import (
    DEVICES,
    DifferentiableOpTests,
    Inputs,
    assert_near,
    evaluate,
    needs_kernels,
    normal,
)

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops._checks import ACTIVATIONS

NAMES = ["fc1_weight_EHD", "fc1_bias_EH", "fc2_weight_EDH", "fc2_bias_ED"]


def mlp_inputs(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The arguments of moe_mlp."""
    return {
        "x_TD": problem.x_TD(dtype, device),
        "weights_TK": problem.weights_TK(dtype, device),
        "plan": problem.plan(device),
        **dict(zip(NAMES, problem.parameters(dtype, device), strict=True)),
        "activation": problem.activation,
    }


class TestMoEMlp(DifferentiableOpTests):
    """The awkward shapes with GELU, the other activations on one problem."""

    name = "moe_mlp"
    problems = PROBLEMS
    small = SMALL
    compiled = COMPILED
    any_problem = any_problem()
    any_float = frozenset({"weights_TK"})
    inputs = staticmethod(mlp_inputs)

    # Not in half types: the reference rounds what goes into a step such as relu's elsewhere.
    @pytest.mark.parametrize("real", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation_equals_the_reference_with_and_without_biases(
        self, activation: str, bias: bool, real: torch.dtype, device: str
    ) -> None:
        problem = Problem(40, 12, 37, 3, 2, bias=bias, activation=activation)
        self.check_agreement(mlp_inputs(problem, real, device))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation_passes_gradcheck(self, activation: str) -> None:
        inputs = mlp_inputs(Problem(5, 3, 4, 3, 2, capacity=3), torch.float64)
        x, weights, plan, *parameters, _ = inputs.values()
        assert torch.autograd.gradcheck(
            lambda x, weights, *p: ops.moe_mlp(x, weights, plan, *p, activation),
            (x, weights, *parameters),
        )

    def test_experts_of_several_blocks_equal_the_reference(self) -> None:
        # One expert takes 2500 rows, more than a block of the forward or of the backward pass.
        self.check_agreement(mlp_inputs(Problem(2500, 8, 12, 3, 2, routing="one"), torch.float32))

    @pytest.mark.parametrize("frozen", [NAMES, NAMES[:2], NAMES[2:]], ids=["experts", "fc1", "fc2"])
    def test_frozen_layers_do_not_change_the_gradients_of_others(self, frozen: list[str]) -> None:
        inputs = mlp_inputs(Problem(30, 6, 10, 4, 2), torch.float64)
        self.check_agreement({**inputs, **{name: inputs[name].detach() for name in frozen}})

    def test_a_token_may_choose_the_same_expert_twice(self) -> None:
        inputs = mlp_inputs(Problem(600, 8, 12, 2, 2), torch.float64)
        inputs["plan"] = ops.moe_plan(torch.zeros(600, 2, dtype=torch.int32), 2)
        self.check_agreement(inputs)

    def test_several_threads_give_what_one_gives(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            self.check_agreement(mlp_inputs(Problem(900, 32, 48, 4, 2), torch.float64))
        finally:
            torch.set_num_threads(before)


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
def test_results_of_many_blocks_repeat_bit_for_bit(device: str) -> None:
    inputs = mlp_inputs(Problem(700, 32, 48, 4, 2), torch.float32, device)
    first = evaluate(ops.moe_mlp, inputs, normal)
    for _ in range(4):
        again = evaluate(ops.moe_mlp, inputs, normal)
        assert all(torch.equal(first[name], again[name]) for name in first)


@needs_kernels
def test_backward_recomputes_what_was_not_saved() -> None:
    problem = Problem(50, 8, 12, 4, 2)
    x, weights, *parameters = (t.detach() for t in problem.layer(torch.float64))
    fixed = (x, weights, *problem.plan(), *parameters, "gelu")
    _, saved = torch.ops.m2mkd.moe_mlp(*fixed, True)
    grad = torch.randn_like(x)
    kept = torch.ops.m2mkd.moe_mlp_backward(grad, saved, *fixed, True, True, True)
    again = torch.ops.m2mkd.moe_mlp_backward(grad, saved[:0], *fixed, True, True, True)
    for a, b in zip(kept, again, strict=True):
        assert_near(a, b)


def test_mismatched_parameters_are_refused_with_the_values() -> None:
    inputs = mlp_inputs(Problem(5, 4, 6, 3, 2), torch.float32)
    w1, b1, b2 = inputs["fc1_weight_EHD"], inputs["fc1_bias_EH"], inputs["fc2_bias_ED"]
    cases = {
        "swish": {"activation": "swish"},
        r"fc2_weight has shape \(3, 6, 4\)": {"fc2_weight_EDH": w1},
        "fc1_bias has shape": {"fc1_bias_EH": b2},
        "number of offsets is 4": {"fc1_weight_EHD": w1[:2], "fc1_bias_EH": b1[:2]},
        r"fc1_weight is torch\.float64": {"fc1_weight_EHD": w1.double()},
    }
    for message, changed in cases.items():
        with pytest.raises(ShapeError, match=message):
            ops.moe_mlp(**{**inputs, **changed})
