"""Gate, plan, gather, expert GEMMs and combine against literals, loops and the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_problems import COMPILED, PROBLEMS, SMALL, Problem, any_problem
from op_testing import (
    DEVICES,
    DifferentiableOpTests,
    Inputs,
    OpTests,
    assert_near,
    draw,
    needs_kernels,
)

from m2mkd import ops
from m2mkd.errors import NotFiniteError, ShapeError
from m2mkd.ops import reference

MODES = ["softmax_selected", "softmax_all", "softmax_all_renorm"]


class TestTopkGate(DifferentiableOpTests):
    """Problems are (tokens, experts, k, mode)."""

    name = "topk_gate"
    problems = tuple(
        pytest.param((*sizes, mode), id=f"{what}, {mode}")
        for mode in MODES
        for what, sizes in {
            "no tokens": (0, 3, 2),
            "all sizes one": (1, 1, 1),
            "some of eight": (65, 8, 2),
            "all of forty": (33, 40, 40),
        }.items()
    )
    small = (4, 5, 2, "softmax_all")
    compiled = ((12, 5, 2, "softmax_all_renorm"), (17, 5, 2, "softmax_all_renorm"))
    any_problem = st.tuples(
        st.integers(0, 9), st.integers(3, 9), st.integers(1, 3), st.sampled_from(MODES)
    )
    region_dtype = torch.float32

    @staticmethod
    def inputs(problem: tuple[int, int, int, str], dtype: torch.dtype, device: str) -> Inputs:
        tokens, experts, k, mode = problem
        logits = draw(tokens, experts, dtype=dtype, device=device, seed=3)
        return {"logits_TE": logits, "k": k, "mode": mode}

    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_passes_gradcheck(self, mode: str) -> None:
        logits = draw(4, 5, dtype=torch.float64, device="cpu", seed=3)
        assert torch.autograd.gradcheck(lambda x: ops.topk_gate(x, 2, mode)[0], logits)


class TestExpertChoice(DifferentiableOpTests):
    """Problems are (tokens, experts, capacity, whether logits have ties)."""

    name = "expert_choice"
    problems = (
        pytest.param((0, 3, 2, False), id="no tokens"),
        pytest.param((1, 1, 1, False), id="all sizes one"),
        pytest.param((65, 8, 16, False), id="some of the tokens"),
        pytest.param((65, 5, 30, True), id="ties"),
        pytest.param((5, 4, 9, False), id="more room than tokens"),
    )
    small = (7, 3, 4, False)
    compiled = ((12, 5, 4, True), (17, 5, 4, True))
    any_problem = st.tuples(
        st.integers(0, 20), st.integers(1, 5), st.integers(1, 20), st.booleans()
    )
    region_dtype = torch.float32

    @staticmethod
    def inputs(problem: tuple[int, int, int, bool], dtype: torch.dtype, device: str) -> Inputs:
        tokens, experts, capacity, ties = problem
        logits = draw(tokens, experts, dtype=dtype, device=device, seed=3)
        if ties:
            logits = logits.detach().round().requires_grad_()
        return {"logits_TE": logits, "capacity": capacity}

    @pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
    def test_logits_that_decide_nothing_are_refused(self, module: object) -> None:
        choose = module.expert_choice  # type: ignore[attr-defined]
        for bad in ([0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]):
            with pytest.raises(NotFiniteError, match="NaN or infinite"):
                choose(torch.tensor([[0.0, 1.0], bad]), 1)
        with pytest.raises(ShapeError, match="capacity=0"):
            choose(torch.zeros(2, 2), 0)


class TestMoEPlan(OpTests):
    """The priority has ties; it matters where the problem has a capacity."""

    name = "moe_plan"
    problems = PROBLEMS
    # Two experts that every token chooses fill their capacity, so a traced plan has no padding.
    small = Problem(6, 1, 1, 2, 2, capacity=3)
    compiled = COMPILED
    any_problem = any_problem()
    any_float = frozenset({"priority_T"})
    dtypes = (torch.float32,)

    @staticmethod
    def inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(5)
        priority = torch.randint(4, (problem.tokens,), generator=generator)
        return {
            "experts_TK": problem.experts_TK(device),
            "num_experts": problem.experts,
            "capacity": problem.capacity,
            "priority_T": priority.to(device, dtype),
        }


class TestMoEGather(DifferentiableOpTests):
    """A copy: under autocast it keeps the dtype of the tokens."""

    name = "moe_gather"
    problems = PROBLEMS
    small = SMALL
    compiled = COMPILED
    any_problem = any_problem()
    region_dtype = torch.float32

    @staticmethod
    def inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
        return {"x_TD": problem.x_TD(dtype, device), "plan": problem.plan(device)}


class TestGroupedLinear(DifferentiableOpTests):
    """Rows of any content, weights and biases of fc1."""

    name = "grouped_linear"
    problems = PROBLEMS
    small = SMALL
    compiled = COMPILED
    any_problem = any_problem()

    @staticmethod
    def inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
        weight, bias, _, _ = problem.parameters(dtype, device)
        return {
            "rows_MD": problem.rows_MD(dtype, device),
            "weight_EHD": weight,
            "bias_EH": bias,
            "offsets": problem.plan(device).offsets,
        }


class TestMoECombine(DifferentiableOpTests):
    """Rows of any content."""

    name = "moe_combine"
    problems = PROBLEMS
    small = SMALL
    compiled = COMPILED
    any_problem = any_problem()
    any_float = frozenset({"weights_TK"})

    @staticmethod
    def inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
        return {
            "rows_MD": problem.rows_MD(dtype, device),
            "weights_TK": problem.weights_TK(dtype, device),
            "plan": problem.plan(device),
        }


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


def test_an_expert_choice_small_enough_to_check_by_eye() -> None:
    logits = torch.tensor([[9.0, 0.0], [1.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
    weights, plan = ops.expert_choice(logits, 2)
    # Expert 0 takes the tokens 0 and 2; expert 1 takes 1 and 3, for which it is even.
    assert plan.token_of_M.tolist() == [0, 2, 1, 3]
    assert plan.row_of_TK.tolist() == [[0, -1], [-1, 2], [1, -1], [-1, 3]]
    assert plan.offsets.tolist() == [0, 2, 4]
    torch.testing.assert_close(weights, logits.softmax(1))
    # A third token for each: of equal ones the lower number.
    _, plan = ops.expert_choice(logits, 3)
    assert plan.token_of_M.tolist() == [0, 1, 2, 1, 2, 3]


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
    with pytest.raises(ShapeError, match=r"E \+ 1 is 2147483648, over the int32 limit"):
        plan(experts.to("meta"), 2**31 - 1)


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
    plain = module.grouped_linear(rows, weight, None, wide.offsets)  # type: ignore[attr-defined]
    assert plain[used:].eq(0).all()
    combined = module.moe_combine(out, weights, wide)  # type: ignore[attr-defined]
    assert_near(
        combined,
        reference.moe_combine(
            reference.grouped_linear(reference.moe_gather(x, plan), weight, bias, plan.offsets),
            weights,
            plan,
        ),
    )
    for grad in torch.autograd.grad(combined.sum(), (out, rows)):
        assert grad[used:].eq(0).all() and grad[:used].ne(0).any()


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
def test_the_kernels_refuse_gradients_of_no_choice() -> None:
    grad, chosen = torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="k=0 with 3 experts"):
        torch.ops.m2mkd.topk_gate_backward(grad, torch.randn(2, 3), chosen, "softmax_all")


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


def test_autocast_of_half_tensors_gates_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.topk_gate(torch.randn(3, 4).bfloat16(), 2)[0].dtype == torch.float32
