"""Attention along a circuit's edges: values, every gradient, choice of form, tracing, export."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from op_testing import (
    DifferentiableOpTests,
    Inputs,
    assert_near,
    assert_same,
    draw,
    evaluate,
    needs_kernels,
    normal,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops import reference
from m2mkd.ops._load import EXTENSION
from m2mkd.ops.circuit_attention import _choose, crossover

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """Sizes, and a kind of graph and of bias.

    graph: random (a tenth to a third of the edges, some receivers and senders without any),
        complete, none, star (receiver 0 takes all), fan (sender 0 to all).
    bias: none, shared ([N]), own ([B, N]), or dead ([B, N], a fifth of them -inf, and all of
        receiver 0's in the first example).
    """

    batch: int = 2
    heads: int = 3
    receivers: int = 7
    senders: int = 9
    width: int = 8
    graph: str = "random"
    bias: str = "own"

    def mask(self) -> Tensor:
        """Where edges are, [U, V]."""
        generator = torch.Generator().manual_seed(3)
        sizes = (self.receivers, self.senders)
        if self.graph == "random":
            mask = torch.rand(sizes, generator=generator) < 0.3
            mask[: self.receivers // 5] = False
            mask[:, : self.senders // 5] = False
            return mask
        mask = torch.full(sizes, self.graph == "complete")
        if self.graph == "star":
            mask[:1] = True
        if self.graph == "fan":
            mask[:, :1] = True
        return mask

    def edge_bias(self, circuit: ops.Circuit, dtype: torch.dtype, device: str) -> Tensor | None:
        """A leaf, or None."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.bias == "none":
            return None
        if self.bias == "shared":
            return draw(circuit.num_edges, dtype=wide, device=device, seed=4)
        bias = draw(self.batch, circuit.num_edges, dtype=wide, device=device, seed=5)
        if self.bias == "dead":
            with torch.no_grad():
                bias[:, ::5] = -torch.inf
                bias[:1, circuit.receiver_of_edge == 0] = -torch.inf
        return bias


def attention_inputs(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The arguments of circuit_attention."""
    circuit = ops.Circuit.from_dense(problem.mask()).to(device)
    q_sizes = (problem.batch, problem.heads, problem.receivers, problem.width)
    k_sizes = (problem.batch, problem.heads, problem.senders, problem.width)
    inputs: Inputs = {
        name: draw(*sizes, dtype=dtype, device=device, seed=seed)
        for seed, (name, sizes) in enumerate(
            {"q_BHUD": q_sizes, "k_BHVD": k_sizes, "v_BHVD": k_sizes}.items()
        )
    }
    return inputs | {"circuit": circuit, "edge_bias": problem.edge_bias(circuit, dtype, device)}


def heads_in_rows(x_BHUD: Tensor) -> Tensor:
    """A leaf with the same values and dtype in memory [B, U, H, D], as a projection leaves it."""
    return x_BHUD.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def graph_of(circuit: ops.Circuit) -> tuple[Tensor, ...]:
    """The circuit as the compiled op takes it."""
    by_receiver = (circuit.row_ptr, circuit.sender)
    return (*by_receiver, circuit.col_ptr, circuit.receiver, circuit.edge_id)


def sparse(
    q_BHUD: Tensor,
    k_BHVD: Tensor,
    v_BHVD: Tensor,
    circuit: ops.Circuit,
    edge_bias: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """The compiled kernel."""
    return ops.circuit_attention(q_BHUD, k_BHVD, v_BHVD, circuit, edge_bias, scale, "sparse")


def dense(
    q_BHUD: Tensor,
    k_BHVD: Tensor,
    v_BHVD: Tensor,
    circuit: ops.Circuit,
    edge_bias: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's dense attention with a mask."""
    return ops.circuit_attention(q_BHUD, k_BHVD, v_BHVD, circuit, edge_bias, scale, "dense")


PROBLEMS = [
    pytest.param(Problem(batch=0), id="no examples"),
    pytest.param(Problem(heads=0), id="no heads"),
    pytest.param(Problem(receivers=0), id="no receivers"),
    pytest.param(Problem(senders=0, bias="shared"), id="no senders"),
    pytest.param(Problem(graph="none"), id="no edges"),
    pytest.param(Problem(1, 1, 1, 1, 1, graph="complete", bias="none"), id="all sizes one"),
    pytest.param(Problem(receivers=1, senders=70, graph="complete"), id="one receiver"),
    pytest.param(Problem(receivers=70, senders=1, graph="complete"), id="one sender"),
    pytest.param(Problem(receivers=5, senders=90, graph="star"), id="one receiver takes all"),
    pytest.param(Problem(receivers=90, senders=5, graph="fan"), id="one sender to all"),
    # In CUDA's backward, three parts of one and two heads.
    pytest.param(Problem(1, 5, 24, 9, 7, bias="shared"), id="heads in uneven parts"),
    pytest.param(Problem(receivers=40, senders=33, width=64, bias="none"), id="no bias"),
    pytest.param(Problem(receivers=40, senders=33, width=16, bias="shared"), id="a bias for all"),
    pytest.param(Problem(receivers=40, senders=33, width=33, bias="dead"), id="biases of -inf"),
    pytest.param(Problem(1, 2, 30, 50, 7, graph="complete"), id="complete, odd width"),
    pytest.param(Problem(1, 2, 20, 31, 100), id="width 100"),
    pytest.param(Problem(1, 1, 20, 30, 255, bias="shared"), id="width 255"),
    pytest.param(Problem(1, 1, 9, 130, 256, graph="complete", bias="shared"), id="width 256"),
]
SMALL = Problem(2, 2, 4, 5, 3, graph="random", bias="shared")


@st.composite
def any_problem(drawn: st.DrawFn) -> Problem:
    """Small sizes; rows of one edge, whose gradients vanish, beside longer ones."""
    return Problem(
        drawn(st.integers(0, 3)),
        drawn(st.integers(1, 3)),
        drawn(st.integers(0, 12)),
        drawn(st.integers(0, 30)),
        drawn(st.integers(1, 40)),
        drawn(st.sampled_from(["random", "complete", "none", "star", "fan"])),
        drawn(st.sampled_from(["none", "shared", "own", "dead"])),
    )


@needs_kernels
class TestSparse(DifferentiableOpTests):
    """The compiled kernels."""

    name = "circuit_attention"
    problems = PROBLEMS
    small = SMALL
    compiled = (Problem(2, bias="shared"), Problem(3, 2, 7, 9, bias="shared"))
    any_problem = any_problem()
    any_float = frozenset({"edge_bias"})
    inputs = staticmethod(attention_inputs)

    @property
    def op(self) -> Op:
        """The kernel, whatever the density."""
        return sparse

    @pytest.mark.parametrize("width", [*range(1, 18), 24, 31, 32, 48, 63, 65, 80, 96, 127, 128])
    def test_every_width_equals_the_reference(self, width: int) -> None:
        problem = Problem(1, 2, 11, 40, width, graph="complete", bias="shared")
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            self.check_agreement(attention_inputs(problem, dtype))

    def test_every_number_of_edges_of_a_receiver_equals_the_reference(self) -> None:
        mask = torch.ones(45, 45).tril().bool()  # receivers of 1 to 45 edges
        inputs = attention_inputs(Problem(1, 2, 45, 45, 24, bias="none"), torch.float32)
        self.check_agreement({**inputs, "circuit": ops.Circuit.from_dense(mask)})

    @pytest.mark.parametrize("sizes", [(2, 1500, 800), (8, 600, 550)])
    def test_many_heads_and_edges_are_done_in_several_waves(
        self, sizes: tuple[int, int, int]
    ) -> None:
        # 16 bytes an edge of a head, and 32 MiB are kept at a time: one head of the first, of the
        # second six, which are one whole group of four.
        problem = Problem(1, *sizes, 1, graph="complete", bias="shared")
        self.check_agreement(attention_inputs(problem, torch.float64))

    @pytest.mark.parametrize("which", ["q_BHUD", "k_BHVD", "v_BHVD", "all"])
    @pytest.mark.parametrize("sizes", [(2, 3, 40, 33, 32), (2, 3, 9, 11, 5)])
    def test_heads_may_lie_inside_rows_and_then_results_lie_so_too(
        self, sizes: tuple[int, ...], which: str, dtype: torch.dtype
    ) -> None:
        inputs = attention_inputs(Problem(*sizes), dtype)
        names = ["q_BHUD", "k_BHVD", "v_BHVD"]
        changed = names if which == "all" else [which]
        moved = inputs | {name: heads_in_rows(inputs[name]) for name in changed}
        expected, found = (evaluate(sparse, x, normal) for x in (inputs, moved))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        out = sparse(**moved)
        grads = torch.autograd.grad(out, [moved[name] for name in names], heads_in_rows(out))
        for name, tensor in zip(["q_BHUD", *names], [out, *grads], strict=True):
            assert tensor.stride() == moved[name].stride()
        torch.library.opcheck(
            torch.ops.m2mkd.circuit_attention,
            (*(moved[name] for name in names), None, *graph_of(moved["circuit"]), 0.5),
            test_utils="test_faketensor",
        )

    def test_compiled_too_heads_may_lie_inside_rows(self) -> None:
        inputs = attention_inputs(Problem(bias="shared"), torch.float32)
        names = ["q_BHUD", "k_BHVD", "v_BHVD"]
        inputs |= {name: heads_in_rows(inputs[name]) for name in names}
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        found, expected = (
            torch.autograd.grad(op(**inputs).square().sum(), [inputs[name] for name in names])
            for op in (compiled, sparse)
        )
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()

    @pytest.mark.parametrize("heads", [(2, 3), (3, 4), (1, 10)])
    def test_the_number_of_threads_changes_no_bit(
        self, heads: tuple[int, int], dtype: torch.dtype
    ) -> None:
        # Heads are summed in groups, some of which may be left over by the threads.
        inputs = attention_inputs(Problem(*heads, 150, 130, 40, bias="shared"), dtype)
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(evaluate(sparse, inputs, normal))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(found[0][name], other[name]) for name in other)

    def test_scale_multiplies_scores_and_not_biases(self) -> None:
        inputs = attention_inputs(SMALL, torch.float64) | {"scale": -0.3}
        self.check_agreement(inputs)

    def test_large_scores_do_not_overflow(self, dtype: torch.dtype) -> None:
        inputs = attention_inputs(Problem(bias="shared"), dtype)
        for name in ("q_BHUD", "k_BHVD"):
            inputs[name] = (inputs[name].detach() * 1e4).requires_grad_()
        found = evaluate(sparse, inputs, normal)
        assert all(value.isfinite().all() for value in found.values())
        assert_near(found["output 0"], reference.circuit_attention(**inputs))

    @pytest.mark.parametrize("name", ["q_BHUD", "k_BHVD", "v_BHVD", "edge_bias"])
    def test_nan_is_not_hidden(self, name: str) -> None:
        inputs = attention_inputs(Problem(graph="complete", bias="shared"), torch.float32)
        spoilt = inputs[name].detach().clone()
        spoilt[..., :1] = torch.nan
        out = sparse(**{**inputs, name: spoilt})
        expected = reference.circuit_attention(**{**inputs, name: spoilt})
        assert torch.equal(out.isnan(), expected.isnan())
        assert out.isnan().any()

    def test_an_infinite_value_is_not_made_nan(self) -> None:
        # Of the last edge of each receiver, which vector code may take for those past the end.
        inputs = attention_inputs(Problem(graph="complete", bias="shared"), torch.float32)
        infinite = inputs["v_BHVD"].detach().clone()
        infinite[:, :, -1] = torch.inf
        assert sparse(**{**inputs, "v_BHVD": infinite}).eq(torch.inf).all()

    def test_widths_over_256_are_refused(self) -> None:
        inputs = attention_inputs(Problem(width=257), torch.float32)
        with pytest.raises(ShapeError, match="no sparse kernel for width 257"):
            sparse(**inputs)
        assert_near(ops.circuit_attention(**inputs), reference.circuit_attention(**inputs))


class TestDense(DifferentiableOpTests):
    """The dense form, which is what runs without the extension too."""

    name = "circuit_attention"
    problems = PROBLEMS
    small = SMALL
    compiled = (Problem(2, bias="shared"), Problem(3, 2, 7, 9, bias="shared"))
    any_problem = any_problem()
    any_float = frozenset({"edge_bias"})
    inputs = staticmethod(attention_inputs)

    @property
    def op(self) -> Op:
        """The dense form, whatever the density."""
        return dense

    # It calls no op of ours; torch's has second derivatives, takes another kernel for training, and
    # leaves rounding errors where gradients vanish, as those of receivers with one edge do.
    test_any_problem_equals_the_reference = None  # type: ignore[assignment]
    test_its_registered_ops_pass_opcheck = None  # type: ignore[assignment]
    test_second_derivatives_are_right_or_refused = None  # type: ignore[assignment]
    test_without_gradients_the_values_are_the_same = None  # type: ignore[assignment]


def test_literal_example() -> None:
    # Receiver 0 hears senders 0 and 1 with weights 3/4 and 1/4, receiver 1 hears nobody.
    circuit = ops.Circuit.from_edges(torch.tensor([0, 0]), torch.tensor([1, 0]), 2, 3)
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([1.0, 1.0, 9.0]).view(1, 1, 3, 1)
    v = torch.tensor([4.0, 8.0, 100.0]).view(1, 1, 3, 1)
    bias = torch.tensor([3.0, 1.0]).log()
    for impl in ("auto", "dense", "reference"):
        out = ops.circuit_attention(q, k, v, circuit, bias, impl=impl)
        torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
@pytest.mark.parametrize("value", [1e3, torch.inf])
def test_without_senders_receivers_get_zeros_whatever_they_ask(impl: str, value: float) -> None:
    circuit = ops.Circuit.from_dense(torch.ones(200, 0))
    q = torch.full((1, 1, 200, 64), value, dtype=torch.float16, requires_grad=True)
    k = torch.zeros(1, 1, 0, 64, dtype=torch.float16, requires_grad=True)
    out = ops.circuit_attention(q, k, k, circuit, impl=impl)
    assert torch.equal(out, torch.zeros_like(q))
    grads = torch.autograd.grad(out.sum(), [q, k])
    assert not grads[0].any() and grads[1].shape == k.shape


@needs_kernels
def test_log_sum_exp_is_minus_infinity_where_nothing_is_heard() -> None:
    circuit = ops.Circuit.from_edges(torch.tensor([0, 2]), torch.tensor([0, 1]), 3, 2)
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 4)
    bias = torch.tensor([0.5, -torch.inf])
    graph = (circuit.row_ptr, circuit.sender, circuit.col_ptr, circuit.receiver, circuit.edge_id)
    _, lse = torch.ops.m2mkd.circuit_attention(q, k, k, bias, *graph, 1.0)
    assert lse.flatten().tolist() == [0.5, -torch.inf, -torch.inf]


def test_a_complete_circuit_is_full_attention() -> None:
    inputs = attention_inputs(Problem(2, 3, 20, 30, 16, "complete", "none"), torch.float32)
    expected = F.scaled_dot_product_attention(*(inputs[n] for n in ("q_BHUD", "k_BHVD", "v_BHVD")))
    assert_near(ops.circuit_attention(**inputs), expected)


@needs_kernels
def test_auto_takes_the_kernel_up_to_the_crossover_and_dense_above() -> None:
    size = 200
    graph = Problem(1, 1, size, size, 64, "complete", "none")
    q, k, v = (
        attention_inputs(graph, torch.float32)[f"{n}"] for n in ("q_BHUD", "k_BHVD", "v_BHVD")
    )
    complete = ops.Circuit.from_dense(torch.ones(size, size))
    for gradients in ("none", "inputs", "bias"):
        limit = crossover("cpu", torch.float32, 64, complete, gradients)
        assert 0 < limit < 0.9
        for density, expected in ((0.9 * limit, "sparse"), (1.1 * limit, "dense")):
            flat = torch.arange(size * size) < density * size * size
            circuit = ops.Circuit.from_dense(flat.view(size, size))
            bias = torch.zeros(circuit.num_edges, requires_grad=gradients == "bias")
            with torch.set_grad_enabled(gradients != "none"):
                assert _choose(q, k, v, circuit, bias, 1.0) == expected


def test_dense_pays_earlier_in_larger_graphs() -> None:
    small, large = (ops.Circuit.from_dense(torch.ones(n, n)) for n in (100, 400))
    for gradients in ("none", "inputs"):
        limits = [crossover("cpu", torch.float32, 64, c, gradients) for c in (small, large)]
        assert limits[0] > limits[1]


@pytest.mark.parametrize("impl", ["auto", "sparse", "dense", "reference"])
def test_every_form_names_what_does_not_fit(impl: str) -> None:
    if impl == "sparse" and not EXTENSION.cpu:
        pytest.skip("the extension is not built")
    inputs = attention_inputs(SMALL, torch.float32)
    wrong = {
        "v has shape": {"v_BHVD": inputs["v_BHVD"][:, :, 1:]},
        "U of q is 3, but the circuit's receivers is 4": {"q_BHUD": inputs["q_BHUD"][:, :, 1:]},
        "H of k is 2, but H of q is 1": {"q_BHUD": inputs["q_BHUD"][:, 1:]},
        "D of k is 3, but D of q is 2": {"q_BHUD": inputs["q_BHUD"][..., 1:]},
        "width 0": {n: inputs[n][..., :0] for n in ("q_BHUD", "k_BHVD", "v_BHVD")},
        "edge_bias has shape": {"edge_bias": inputs["edge_bias"][1:]},
    }
    for message, change in wrong.items():
        with pytest.raises(ShapeError, match=message):
            ops.circuit_attention(**{**inputs, **change}, impl=impl)
    with pytest.raises(ShapeError, match="unknown impl='fast'"):
        ops.circuit_attention(**inputs, impl="fast")


@needs_kernels
@pytest.mark.parametrize(
    ("name", "index", "value"), [("sender", 5, 5), ("row_ptr", 1, 9), ("sender", 0, -1)]
)
def test_the_kernel_itself_refuses_a_graph_that_reads_out_of_bounds(
    name: str, index: int, value: int
) -> None:
    inputs = attention_inputs(SMALL, torch.float32)
    circuit = inputs["circuit"]
    graph = {n: t.clone() for n, t in circuit.tensors().items() if n != "receiver_of_edge"}
    graph[name][index] = value
    with pytest.raises(RuntimeError, match=name):
        torch.ops.m2mkd.circuit_attention(
            inputs["q_BHUD"], inputs["k_BHVD"], inputs["v_BHVD"], None, *graph.values(), 1.0
        )


@needs_kernels
@pytest.mark.parametrize("name", ["sender", "col_ptr", "receiver", "edge_id"])
def test_the_kernel_itself_refuses_a_transpose_of_another_graph(name: str) -> None:
    inputs = attention_inputs(Problem(1, 1, 4, 5, 3, graph="complete"), torch.float32)
    kept = inputs["circuit"].tensors()
    graph = {n: t.clone() for n, t in kept.items() if n != "receiver_of_edge"}
    # Within bounds: two edges change places, or a column takes an edge of the next.
    graph[name][1:3] = graph[name][1:3].flip(0) if name != "col_ptr" else graph[name][1:3] + 1
    tensors = [inputs[n] for n in ("q_BHUD", "k_BHVD", "v_BHVD")]
    out = torch.ops.m2mkd.circuit_attention(*tensors, None, *graph.values(), 1.0)[0]
    with pytest.raises(RuntimeError, match="list other edges of sender"):
        out.sum().backward()


def test_on_cuda_half_types_go_dense_earlier_for_tensor_cores() -> None:
    circuit = ops.Circuit.from_dense(torch.ones(4, 4))
    half, full = (
        crossover("cuda", dtype, 64, circuit, "none") for dtype in (torch.bfloat16, torch.float32)
    )
    assert 0 < half < full < crossover("cpu", torch.float32, 64, circuit, "none")


def test_on_cuda_the_dense_bias_has_the_dtype_of_the_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    circuit = ops.Circuit.from_dense(torch.ones(3, 4))
    found = []

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
        found.append(attn_mask.dtype)
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with FakeTensorMode(allow_non_fake_inputs=True):  # CUDA tensors without memory or a card
        q, k, v = (
            torch.empty(1, 2, length, 8, device="cuda", dtype=torch.bfloat16)
            for length in (3, 4, 4)
        )
        bias = torch.empty(circuit.num_edges, device="cuda")
        ops.circuit_attention(q, k, v, circuit.to("cuda"), bias, impl="dense")
    assert found == [torch.bfloat16]


class Propagator(torch.nn.Module):
    """A module that holds its circuit."""

    def __init__(self, problem: Problem, impl: str) -> None:
        super().__init__()
        self.circuit = ops.Circuit.from_dense(problem.mask())
        self.bias = torch.nn.Parameter(torch.randn(self.circuit.num_edges))
        self.impl = impl

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends along the circuit."""
        return ops.circuit_attention(q, k, v, self.circuit, self.bias, impl=self.impl)


@needs_kernels
@pytest.mark.parametrize("impl", ["sparse", "dense"])
def test_a_module_that_holds_its_circuit_compiles_in_one_graph(impl: str) -> None:
    torch._dynamo.reset()
    module = Propagator(Problem(), impl)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for batch in (2, 5):
        inputs = attention_inputs(Problem(batch), torch.float32)
        arguments = {n[0]: inputs[n] for n in ("q_BHUD", "k_BHVD", "v_BHVD")}
        assert_same(evaluate(compiled, arguments, normal), evaluate(module, arguments, normal))


@needs_kernels
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("impl", ["sparse", "dense", "reference"])
def test_exported_with_a_dynamic_batch(impl: str, strict: bool) -> None:
    module = Propagator(Problem(), impl)
    batch = torch.export.Dim("batch", min=2, max=1000)
    inputs = attention_inputs(Problem(), torch.float32)
    arguments = tuple(inputs[n].detach() for n in ("q_BHUD", "k_BHVD", "v_BHVD"))
    exported = torch.export.export(
        module, arguments, dynamic_shapes=({0: batch},) * 3, strict=strict
    )
    if impl == "sparse":
        targets = {str(node.target) for node in exported.graph.nodes}
        assert "m2mkd.circuit_attention.default" in targets
    for count in (2, 7):
        inputs = attention_inputs(Problem(count), torch.float32)
        arguments = tuple(inputs[n].detach() for n in ("q_BHUD", "k_BHVD", "v_BHVD"))
        assert_near(exported.module()(*arguments), module(*arguments).detach())
