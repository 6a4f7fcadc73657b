"""Gate, plan, gather, expert GEMMs and combine against literals, loops and the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import (
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
from m2mkd.errors import NotFiniteError, ShapeError
from m2mkd.ops import reference

MODES = ["softmax_selected", "softmax_all", "softmax_all_renorm"]


def test_a_plan_small_enough_to_check_by_eye() -> None:
    experts = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=torch.int32)
    plan = ops.moe_plan(experts, 4)
    # Expert 0: tokens 0 and 2; expert 1: tokens 0, 1, 2; expert 2: token 1; expert 3: none.
    assert plan.token_of_M.tolist() == [0, 2, 0, 1, 2, 1]
    assert plan.row_of_TK.tolist() == [[2, 0], [3, 5], [1, 4]]
    assert plan.offsets.tolist() == [0, 2, 5, 6, 6]


def test_a_plan_with_capacity_places_first_choices_first_and_by_priority() -> None:
    experts = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.int32)
    plan = ops.moe_plan(experts, 2, capacity=2, priority_T=torch.tensor([0.1, 0.9, 0.5]))
    # First choices in order of priority: 1 -> e1, 2 -> e0, 0 -> e1. Second: 1 -> e0, 2 and 0 none.
    assert plan.token_of_M.tolist() == [2, 1, 1, 0]
    assert plan.row_of_TK.tolist() == [[3, -1], [2, 1], [0, -1]]
    assert plan.offsets.tolist() == [0, 2, 4]


def test_a_gate_small_enough_to_check_by_eye() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    weights, experts = ops.topk_gate(logits, 2)
    assert experts.tolist() == [[1, 2], [0, 1]]
    first = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(weights, torch.tensor([[first, 1 - first], [0.5, 0.5]]))


def test_combine_adds_weighted_rows_and_nothing_for_dropped_choices() -> None:
    row_of = torch.tensor([[1, 0], [-1, 2]], dtype=torch.int32)
    plan = ops.MoEPlan(
        row_of,
        torch.tensor([0, 0, 1], dtype=torch.int32),
        torch.tensor([0, 1, 3], dtype=torch.int32),
    )
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 7.0]])
    out = ops.moe_combine(rows, torch.tensor([[0.5, 2.0], [9.0, 3.0]]), plan)
    assert out.tolist() == [[7.0, 14.0], [15.0, 21.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 3, 2), (1, 1, 1), (65, 8, 2), (33, 40, 40)]
)
def test_gate_equals_its_reference(
    device: str, mode: str, dtype: torch.dtype, tokens: int, experts: int, k: int
) -> None:
    logits = Problem(tokens, 1, 1, experts, k).draw(
        tokens, experts, dtype=dtype, device=device, seed=3
    )
    assert torch.equal(ops.topk_gate(logits, k, mode)[1], reference.topk_gate(logits, k, mode)[1])
    check_against(
        lambda x: ops.topk_gate(x, k, mode)[0],
        lambda x: reference.topk_gate(x, k, mode)[0],
        [logits],
    )


@pytest.mark.parametrize("device", DEVICES)
def test_gate_breaks_ties_towards_the_lower_expert(device: str) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 1.0, 5.0]], device=device).repeat(3, 1)
    logits[1] = -torch.inf
    logits[1, 3] = 0.0
    weights, experts = ops.topk_gate(logits, 4)
    assert experts.tolist() == [[1, 2, 4, 0], [3, 0, 1, 2], [1, 2, 4, 0]]
    assert weights[1].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("module", [ops, reference])
def test_gate_refuses_nan_and_impossible_arguments(module: object) -> None:
    gate = module.topk_gate  # type: ignore[attr-defined]
    with pytest.raises(NotFiniteError, match="NaN"):
        gate(torch.tensor([[0.0, torch.nan]]), 1)
    with pytest.raises(ShapeError, match="k=3"):
        gate(torch.zeros(2, 2), 3)
    with pytest.raises(ShapeError, match="softmax_selected"):
        gate(torch.zeros(2, 2), 1, "softmin")
    with pytest.raises(ShapeError, match="int64"):
        gate(torch.zeros(2, 2, dtype=torch.int64), 1)


def plan_by_loop(
    experts: list[list[int]], num_experts: int, capacity: int | None, priority: list[float] | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows as (expert, place) of each choice, None where dropped, by the definition."""
    tokens, k = len(experts), len(experts[0]) if experts else 0
    listing = [(t, j) for t in range(tokens) for j in range(k)]
    if capacity is not None:
        order = sorted(range(tokens), key=lambda t: -priority[t]) if priority else range(tokens)
        listing = [(t, j) for j in range(k) for t in order]
    members: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for t, j in listing:
        if capacity is None or len(members[experts[t][j]]) < capacity:
            members[experts[t][j]].append((t, j))
    row_of = [[-1] * k for _ in range(tokens)]
    token_of = []
    for group in members:
        for t, j in group:
            row_of[t][j] = len(token_of)
            token_of.append(t)
    return row_of, token_of


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_plan_equals_the_loop_that_defines_it(module: object, data: st.DataObject) -> None:
    tokens, k = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(1, 5))
    capacity = data.draw(st.none() | st.integers(1, 6))
    chosen = st.lists(st.integers(0, num_experts - 1), min_size=k, max_size=k)
    experts = data.draw(st.lists(chosen, min_size=tokens, max_size=tokens))
    priority = data.draw(
        st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=tokens, max_size=tokens)
    )
    plan = module.moe_plan(  # type: ignore[attr-defined]
        torch.tensor(experts, dtype=torch.int32).view(tokens, k),
        num_experts,
        capacity,
        None if priority is None else torch.tensor(priority),
    )
    row_of, token_of = plan_by_loop(experts, num_experts, capacity, priority)
    assert plan.row_of_TK.tolist() == row_of
    assert plan.token_of_M.tolist() == token_of
    assert int(plan.offsets[-1]) == len(token_of)
    assert all(part.dtype == torch.int32 for part in plan)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 700])
def test_a_plan_on_the_gpu_equals_the_one_on_the_cpu(capacity: int | None) -> None:
    problem = Problem(5000, 1, 1, 7, 2)
    priority = torch.rand(5000)
    on_cpu = ops.moe_plan(problem.experts_TK(), 7, capacity, priority)
    on_gpu = ops.moe_plan(problem.experts_TK("cuda"), 7, capacity, priority.cuda())
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("module", [ops, reference])
def test_a_plan_refuses_capacity_zero_and_unknown_experts(module: object) -> None:
    plan = module.moe_plan  # type: ignore[attr-defined]
    experts = torch.tensor([[0, 3]], dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"capacity=0.*T=1.*K=2.*num_experts=4"):
        plan(experts, 4, 0)
    with pytest.raises(ShapeError, match=r"from 0 to 3.*num_experts=3"):
        plan(experts, 3)
    with pytest.raises(ShapeError, match="from -1"):
        plan(experts - 1, 4)
    with pytest.raises(ShapeError, match="int64"):
        plan(experts.long(), 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gather_equals_its_reference(problem: Problem, dtype: torch.dtype, device: str) -> None:
    plan = problem.plan(device)
    x = problem.layer(dtype, device)[0]
    check_against(lambda x: ops.moe_gather(x, plan), lambda x: reference.moe_gather(x, plan), [x])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_combine_equals_its_reference(problem: Problem, dtype: torch.dtype, device: str) -> None:
    plan = problem.plan(device)
    rows = problem.draw(plan.token_of_M.shape[0], problem.width, dtype=dtype, device=device, seed=1)
    weights = problem.layer(dtype, device)[1]
    check_against(
        lambda r, w: ops.moe_combine(r, w, plan),
        lambda r, w: reference.moe_combine(r, w, plan),
        [rows, weights],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_grouped_linear_equals_its_reference(
    problem: Problem, bias: bool, dtype: torch.dtype, device: str
) -> None:
    plan = problem.plan(device)
    rows = problem.draw(plan.token_of_M.shape[0], problem.width, dtype=dtype, device=device, seed=1)
    _, _, weight, shift, _, _ = problem.layer(dtype, device, bias)
    check_against(
        lambda r, w, b: ops.grouped_linear(r, w, b, plan.offsets),
        lambda r, w, b: reference.grouped_linear(r, w, b, plan.offsets),
        [rows, weight, shift],
    )


def padded(plan: ops.MoEPlan, extra: int) -> ops.MoEPlan:
    """The plan as a trace would make it, with rows past the last offset."""
    tail = plan.token_of_M.new_full((extra,), -1)
    return plan._replace(token_of_M=torch.cat([plan.token_of_M, tail]))


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
def test_padding_rows_are_zero_and_get_zero_gradients(module: object) -> None:
    problem = Problem(9, 4, 6, 3, 2, capacity=4)
    plan = problem.plan()
    wide = padded(plan, 5)
    x, weights, weight, bias, _, _ = problem.layer(torch.float64)
    used = plan.token_of_M.shape[0]
    rows = module.moe_gather(x, wide)  # type: ignore[attr-defined]
    assert rows[used:].eq(0).all()
    rows = torch.cat([rows[:used], torch.full((5, 4), torch.nan)]).requires_grad_()
    out = module.grouped_linear(rows, weight, bias, wide.offsets)  # type: ignore[attr-defined]
    assert out[used:].eq(0).all()
    combined = module.moe_combine(out, weights, wide)  # type: ignore[attr-defined]
    assert_near(
        combined,
        reference.moe_combine(
            reference.grouped_linear(reference.moe_gather(x, plan), weight, bias, plan.offsets),
            weights,
            plan,
        ),
    )
    (grad,) = torch.autograd.grad(combined.sum(), rows)
    assert grad[used:].eq(0).all() and grad[:used].ne(0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_tensors_and_gradients_are_accepted(device: str) -> None:
    problem = Problem(20, 6, 10, 4, 2)
    plan = problem.plan(device)
    x = torch.randn(6, 20, dtype=torch.float64, device=device).T.requires_grad_()
    weight = torch.randn(6, 10, 4, dtype=torch.float64, device=device).permute(2, 1, 0)
    weight = weight.requires_grad_()

    def layer(module: object, x: Tensor, weight: Tensor) -> Tensor:
        rows = module.grouped_linear(  # type: ignore[attr-defined]
            module.moe_gather(x, plan),
            weight,
            None,
            plan.offsets,  # type: ignore[attr-defined]
        )
        ones = torch.ones(1, 1, dtype=torch.float64, device=device).expand(20, 2)
        return module.moe_combine(rows, ones, plan)  # type: ignore[attr-defined]

    found = torch.autograd.grad(layer(ops, x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(layer(reference, x, weight).sum(), (x, weight))
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)


def test_mismatched_tensors_are_refused_with_the_values() -> None:
    problem = Problem(5, 4, 6, 3, 2)
    plan = problem.plan()
    x, weights, weight, bias, _, _ = problem.layer(torch.float32)
    with pytest.raises(ShapeError, match="T of x is 4"):
        ops.moe_gather(x[:4], plan)
    with pytest.raises(ShapeError, match=r"token_of_M is torch\.int64"):
        ops.moe_gather(x, plan._replace(token_of_M=plan.token_of_M.long()))
    rows = ops.moe_gather(x, plan)
    with pytest.raises(ShapeError, match="float64"):
        ops.grouped_linear(rows, weight.double(), None, plan.offsets)
    with pytest.raises(ShapeError, match=r"bias has shape \(3, 5\)"):
        ops.grouped_linear(rows, weight, bias[:, :5], plan.offsets)
    with pytest.raises(ShapeError, match=r"weights have shape \(5, 1\)"):
        ops.moe_combine(rows, weights[:, :1], plan)
    with pytest.raises(ShapeError, match="on meta"):
        ops.moe_combine(rows, weights.to("meta"), plan)


@needs_kernels
def test_the_kernels_refuse_a_plan_that_points_outside() -> None:
    plan = Problem(5, 4, 6, 3, 2).plan()
    x = torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match=r"token_of\[0\] is 5"):
        ops.moe_gather(x, plan._replace(token_of_M=plan.token_of_M + 5 - plan.token_of_M[0]))
    with pytest.raises(RuntimeError, match="row_of"):
        ops.moe_combine(x.new_zeros(10, 4), x[:, :2], plan._replace(row_of_TK=plan.row_of_TK + 1))
    with pytest.raises(RuntimeError, match="offsets must rise"):
        ops.grouped_linear(x.new_zeros(10, 4), x.new_zeros(3, 2, 4), None, plan.offsets.flip(0))


def test_autocast_gates_in_float32_and_computes_in_bfloat16() -> None:
    problem = Problem(12, 8, 16, 4, 2)
    plan = problem.plan()
    x, weights, weight, bias, _, _ = problem.layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.topk_gate(torch.randn(3, 4).bfloat16(), 2)[0].dtype == torch.float32
        rows = ops.grouped_linear(x[plan.token_of_M.long()], weight, bias, plan.offsets)
        assert rows.dtype == torch.bfloat16
        assert ops.moe_combine(rows, weights, plan).dtype == torch.bfloat16
        double = ops.grouped_linear(
            x[plan.token_of_M.long()].double(), weight.double(), None, plan.offsets
        )
        assert double.dtype == torch.float64
    rows.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@needs_kernels
def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    weights, _ = ops.topk_gate(logits, 2)
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
