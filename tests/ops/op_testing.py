"""What every op must pass. A new op gets all of it from one class in its test file:

    from op_testing import DifferentiableOpTests, draw

    class TestScale(DifferentiableOpTests):
        name = "scale"  # m2mkd.ops.scale, its reference m2mkd.ops.reference.scale
        problems = (pytest.param((0, 3), id="no rows"), pytest.param((65, 7), id="odd sizes"))
        small = (4, 3)  # for gradcheck, opcheck, layouts, autocast and refusals
        compiled = ((4, 3), (9, 3))  # traced one after the other; the second with symbolic sizes
        any_problem = st.tuples(st.integers(0, 9), st.integers(1, 9))

        @staticmethod
        def inputs(problem, dtype, device):
            rows, width = problem
            return {"x": draw(rows, width, dtype=dtype, device=device, seed=0), "factor": 2.0}

A problem is any value; `inputs` makes the keyword arguments of the op from it. Tensors that want
gradients are compared and differentiated; named tuples of tensors (a plan) and objects with `.to`
(a circuit) are arguments too. Problems should hold the awkward shapes: nothing, one, non-multiples
of a tile, all work in one place. An op without gradients takes `OpTests`. Its registered ops go
into `REGISTERED` below. What only this op promises is tested beside the class, a literal example
small enough to check by eye among it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops import reference
from m2mkd.ops._load import EXTENSION

needs_kernels = pytest.mark.skipif(not EXTENSION.cpu, reason="the extension is not built")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The ops in csrc/library.cpp that each public op runs, forward and backward; none where torch's
# own are enough.
REGISTERED = {
    "topk_gate": {"topk_gate", "topk_gate_backward"},
    "expert_choice": set(),
    "moe_plan": {"moe_plan"},
    "moe_gather": {"moe_gather", "moe_gather_backward"},
    "grouped_linear": {"grouped_linear", "grouped_linear_backward"},
    "moe_combine": {"moe_combine", "moe_combine_backward"},
    "moe_mlp": {"moe_mlp", "moe_mlp_backward"},
    "read_in_attention": set(),
    "edge_log_affinity": set(),
    "circuit_attention": {"circuit_attention", "circuit_attention_backward"},
}

# Relative to the largest entry. GEMMs over a few hundred terms in another order differ by some
# units in the last place; half types round every stage, the reference at other places.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}

Inputs = dict[str, Any]


def draw(*sizes: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal values, the same for every dtype up to rounding; a leaf that wants gradients."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    return values.to(device, dtype).requires_grad_()


def assert_near(found: Tensor, expected: Tensor, what: str = "values") -> None:
    """Compares in units of the largest expected entry, at the tolerance of its dtype.

    Integers must be equal.
    """
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if not expected.is_floating_point():
        assert torch.equal(found, expected), what
        return
    if expected.numel() == 0:
        return
    exact = expected.detach().double()
    difference = float((found.detach().double() - exact).abs().max())
    limit = TOLERANCE[expected.dtype] * max(1e-3, float(exact.abs().max()))
    assert difference <= limit, f"{what}: {difference:.3e} > {limit:.3e}"


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among the inputs that want gradients."""
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }


def evaluate(
    op: Callable[..., Any], inputs: Inputs, upstream: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """All results of an op by name: its outputs, and the gradient of every leaf.

    Args:
        op: Called with the inputs as keywords.
        inputs: Its arguments.
        upstream: Makes the gradient of an output from that output.
    """
    outputs = [out for out in pytree.tree_leaves(op(**inputs)) if out is not None]
    results = {f"output {i}": out for i, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if differentiable:
        wanted = leaves(inputs)
        grads = torch.autograd.grad(
            differentiable, list(wanted.values()), [upstream(out) for out in differentiable]
        )
        results |= {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def normal(out: Tensor) -> Tensor:
    """An upstream gradient of normal values."""
    generator = torch.Generator().manual_seed(99)
    values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return values.to(out.device, out.dtype)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares what two calls of `evaluate` returned."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, name)


def strided(tensor: Tensor) -> Tensor:
    """The same values with a stride of 2 in every dimension; a leaf like the original."""
    wide = tensor.new_empty([2 * size for size in tensor.shape])
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.detach())
    return view.detach().requires_grad_(tensor.requires_grad)


def shifted(tensor: Tensor, by: int = 1) -> Tensor:
    """The same values, dense, but `by` elements past a whole address; a leaf like the original."""
    view = tensor.new_empty(tensor.numel() + by)[by:].view(tensor.shape)
    view.copy_(tensor.detach())
    return view.detach().requires_grad_(tensor.requires_grad)


def every_tensor(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with each tensor changed, also those inside named tuples."""
    changed: Inputs = pytree.tree_map_only(Tensor, change, inputs)
    return changed


def on_meta(inputs: Inputs) -> Inputs:
    """The inputs without their values: everything on the meta device."""
    moved = every_tensor(inputs, lambda t: t.to("meta"))
    return {n: v.to("meta") if hasattr(v, "to") else v for n, v in moved.items()}


def one_changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Inputs]]:
    """For each tensor of the inputs its name, and inputs in which only that one is changed."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, {**inputs, name: change(value)}
        elif hasattr(value, "_fields"):
            for field, part in value._asdict().items():
                changed = value._replace(**{field: change(part)})
                yield f"{name}.{field}", {**inputs, name: changed}


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the last call of each of our registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the op, after taking note of it."""
        if func.namespace == "m2mkd":
            self.calls[func._opname] = (func, args)
        return func(*args, **(kwargs or {}))


class OpTests:
    """Checks of an op without gradients; see the module's docstring.

    Attributes:
        name: Of the function in `m2mkd.ops` and in `m2mkd.ops.reference`.
        problems: pytest parameters, compared in every dtype.
        small: A problem of a few numbers.
        compiled: Two problems that differ in the sizes a trace should leave open, with widths of
            whole 16-byte packs in float32.
        any_problem: What hypothesis draws from, small too.
        dtypes: Of the comparison with the reference.
        region_dtype: Dtype of the result under bfloat16 autocast of float32 inputs.
        any_float: Arguments that may have another floating dtype than the rest.
        inputs: A static method: the op's keyword arguments for a problem, dtype and device.
    """

    name: ClassVar[str]
    problems: ClassVar[Sequence[Any]]
    small: ClassVar[Any]
    compiled: ClassVar[Sequence[Any]]
    any_problem: ClassVar[SearchStrategy[Any]]
    dtypes: ClassVar[Sequence[torch.dtype]] = DTYPES
    region_dtype: ClassVar[torch.dtype] = torch.bfloat16
    any_float: ClassVar[frozenset[str]] = frozenset()
    inputs: Callable[[Any, torch.dtype, str], Inputs]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Hands the class's problems, dtypes and devices to the tests that ask for them."""
        choices = {"problem": self.problems, "dtype": self.dtypes, "device": DEVICES}
        for argument, values in choices.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    @property
    def op(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(ops, self.name)
        return function

    @property
    def plain(self) -> Callable[..., Any]:
        """The reference."""
        function: Callable[..., Any] = getattr(reference, self.name)
        return function

    def check_agreement(
        self, inputs: Inputs, upstream: Callable[[Tensor], Tensor] = normal
    ) -> None:
        """Compares values and every gradient with those of the reference."""
        assert_same(evaluate(self.op, inputs, upstream), evaluate(self.plain, inputs, upstream))

    def check_refused(self, inputs: Inputs, what: str, match: str) -> None:
        """Asserts that op and reference raise a ShapeError which names the op."""
        for function in (self.op, self.plain):
            try:
                function(**inputs)
            except ShapeError as error:
                assert str(error).startswith(f"{self.name}: "), error
                assert match in str(error), f"{what}: {error}"
            else:
                pytest.fail(f"{self.name} takes {what}")

    def test_values_and_every_gradient_equal_the_reference(
        self, problem: Any, dtype: torch.dtype, device: str
    ) -> None:
        self.check_agreement(self.inputs(problem, dtype, device))

    def test_any_problem_equals_the_reference(self) -> None:
        @settings(max_examples=25)
        @given(problem=self.any_problem)
        def check(problem: Any) -> None:
            self.check_agreement(self.inputs(problem, torch.float64, "cpu"))

        check()

    def test_results_repeat_bit_for_bit(self, device: str) -> None:
        inputs = self.inputs(self.compiled[-1], torch.float32, device)
        first = evaluate(self.op, inputs, normal)
        for _ in range(3):
            again = evaluate(self.op, inputs, normal)
            assert all(torch.equal(first[name], again[name]) for name in first)

    def test_strided_inputs_are_accepted(self, device: str) -> None:
        inputs = self.inputs(self.small, torch.float64, device)
        self.check_agreement(every_tensor(inputs, strided))

    @pytest.mark.parametrize("by", [1, 2])
    def test_each_input_may_lie_at_any_address(self, by: int, device: str) -> None:
        inputs = self.inputs(self.compiled[0], torch.float32, device)
        for _, case in one_changed(inputs, lambda tensor: shifted(tensor, by)):
            self.check_agreement(case)
        self.check_agreement(inputs, lambda out: shifted(normal(out), by))

    @needs_kernels
    # opcheck itself looks at .grad of tensors that are not leaves.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("wants_grad", [True, False], ids=["with gradients", "without"])
    def test_its_registered_ops_pass_opcheck(self, wants_grad: bool) -> None:
        inputs = self.inputs(self.small, torch.float32, "cpu")
        with Recorder() as recorder, torch.set_grad_enabled(wants_grad):
            evaluate(self.op, inputs, normal)
        expected = REGISTERED[self.name]
        if not wants_grad:
            expected = {name for name in expected if not name.endswith("_backward")}
        assert set(recorder.calls) == expected
        for name, (func, args) in recorder.calls.items():
            is_forward = wants_grad and not name.endswith("_backward")
            args = pytree.tree_map_only(
                Tensor,
                lambda t, keep=is_forward: t.detach().requires_grad_(keep and t.requires_grad),
                args,
            )
            torch.library.opcheck(func, args)

    @needs_kernels
    def test_its_kernels_refuse_tensors_of_another_device(self) -> None:
        with Recorder() as recorder:
            evaluate(self.op, self.inputs(self.small, torch.float32, "cpu"), normal)
        # The dispatcher itself would choose the other device's kernel.
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        for func, args in recorder.calls.values():
            tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
            for i in tensors if len(tensors) > 1 else []:
                moved = [*args[:i], args[i].to("meta"), *args[i + 1 :]]
                with pytest.raises(RuntimeError, match="is on another device than"):
                    func.redispatch(cpu, *moved)

    def test_compiled_in_one_graph_it_gives_eager_results(self, device: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.op, backend="aot_eager", fullgraph=True)
        for problem in self.compiled:
            inputs = self.inputs(problem, torch.float32, device)
            assert_same(evaluate(compiled, inputs, normal), evaluate(self.op, inputs, normal))

    def test_autocast_decides_the_dtype_and_keeps_that_of_gradients(self, device: str) -> None:
        inputs = self.inputs(self.small, torch.float32, device)
        with torch.autocast(device, torch.bfloat16):
            found = evaluate(self.op, inputs, normal)
        for name, value in evaluate(self.plain, inputs, normal).items():
            if name.startswith("output") and value.is_floating_point():
                value = value.to(self.region_dtype)
            assert found[name].dtype == value.dtype, name
            if value.is_floating_point():
                assert_near(found[name].to(self.region_dtype), value.to(self.region_dtype), name)
        inputs = self.inputs(self.small, torch.float64, device)
        with torch.autocast(device, torch.bfloat16):
            found = evaluate(self.op, inputs, normal)
        assert_same(found, evaluate(self.plain, inputs, normal))

    def test_all_on_the_meta_device_gives_shapes_and_a_mixture_is_refused(self) -> None:
        inputs = self.inputs(self.small, torch.float32, "cpu")
        changed = list(one_changed(inputs, lambda t: t.detach().to("meta")))
        for name, value in inputs.items():
            if hasattr(value, "to") and not isinstance(value, Tensor):
                changed.append((name, {**inputs, name: value.to("meta")}))
        if len(changed) > 1:  # else it takes one tensor, which is nowhere else than itself
            for what, case in changed:
                self.check_refused(case, f"{what} on another device", "meta")
        expected = pytree.tree_leaves(self.op(**inputs))
        for function in (self.op, self.plain):
            found = pytree.tree_leaves(function(**on_meta(inputs)))
            for a, b in zip(found, expected, strict=True):
                assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)

    def test_wrong_dtypes_are_refused(self) -> None:
        inputs = self.inputs(self.small, torch.float32, "cpu")
        for what, case in one_changed(inputs, lambda t: t.detach().to(torch.int64)):
            self.check_refused(case, f"int64 for {what}", "int64")
        floats = {n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
        alike = sorted(floats - self.any_float)
        for name in alike[1:]:
            case = {**inputs, name: inputs[name].detach().double()}
            self.check_refused(case, f"float64 for {name} alone", "float64")

    def test_a_dimension_too_many_is_refused(self) -> None:
        inputs = self.inputs(self.small, torch.float32, "cpu")
        for what, case in one_changed(inputs, lambda t: t.detach()[None]):
            self.check_refused(case, f"one more dimension of {what}", "shape")


class DifferentiableOpTests(OpTests):
    """Checks of an op with gradients; see the module's docstring."""

    def as_function(self, inputs: Inputs) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The op as a function of its leaves alone, and these."""
        wanted = leaves(inputs)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(wanted, values, strict=True))
            outputs = pytree.tree_leaves(self.op(**{**inputs, **given}))
            return tuple(out for out in outputs if out.requires_grad)

        return function, tuple(wanted.values())

    def test_gradients_pass_gradcheck(self) -> None:
        inputs = self.inputs(self.small, torch.float64, "cpu")
        assert torch.autograd.gradcheck(*self.as_function(inputs))

    @pytest.mark.parametrize("layout", ["strided", "expanded"])
    def test_upstream_gradients_of_any_layout_are_accepted(self, layout: str, device: str) -> None:
        inputs = self.inputs(self.small, torch.float64, device)

        def upstream(out: Tensor) -> Tensor:
            if layout == "strided":
                return strided(normal(out))
            return normal(out.new_empty(())).expand(out.shape)

        self.check_agreement(inputs, upstream)

    def test_each_saved_tensor_may_come_back_at_any_address(self, device: str) -> None:
        # As from torch.autograd.graph.save_on_cpu, or any other hook.
        inputs = self.inputs(self.compiled[0], torch.float32, device)
        expected = evaluate(self.plain, inputs, normal)
        saved: list[Tensor] = []
        moved = 0

        def save(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        def load(number: int) -> Tensor:
            return shifted(saved[number]) if number == moved else saved[number]

        with torch.autograd.graph.saved_tensors_hooks(save, load):
            while moved <= len(saved):  # the last time none
                saved.clear()
                assert_same(evaluate(self.op, inputs, normal), expected)
                moved += 1

    def test_frozen_inputs_do_not_change_the_gradients_of_others(self, device: str) -> None:
        inputs = self.inputs(self.small, torch.float64, device)
        expected = evaluate(self.plain, inputs, normal)
        wanted = leaves(inputs)
        for name in wanted:
            if len(wanted) > 1:
                found = evaluate(self.op, {**inputs, name: inputs[name].detach()}, normal)
                assert_same(
                    found, {n: v for n, v in expected.items() if n != f"gradient of {name}"}
                )

    @pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_the_values_are_the_same(
        self, region: Callable[[], AbstractContextManager[Any]], device: str
    ) -> None:
        inputs = self.inputs(self.small, torch.float32, device)
        trained = pytree.tree_leaves(self.op(**inputs))
        with region():
            inferred = pytree.tree_leaves(self.op(**inputs))
        assert all(torch.equal(a, b) for a, b in zip(trained, inferred, strict=True))
        assert not any(out.requires_grad for out in inferred)
        computed = [b for a, b in zip(trained, inferred, strict=True) if a.requires_grad]
        assert all(out.is_inference() == (region is torch.inference_mode) for out in computed)

    @needs_kernels
    def test_second_derivatives_are_right_or_refused(self) -> None:
        inputs = self.inputs(self.small, torch.float64, "cpu")
        if not REGISTERED[self.name]:
            assert torch.autograd.gradgradcheck(*self.as_function(inputs))
            return
        wanted = list(leaves(inputs).values())
        outputs = [out for out in pytree.tree_leaves(self.op(**inputs)) if out.requires_grad]
        first = torch.autograd.grad(outputs[0].square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            sum(g.square().sum() for g in first).backward()
