"""Registrations of the compiled ops, torch.compile in one graph, and torch.export."""

import pytest
import torch
from moe_problems import Problem
from op_testing import REGISTERED, assert_near, draw, needs_kernels
from torch import Tensor
from torch.autograd import forward_ad

from m2mkd import ops
from m2mkd.ops import reference

pytestmark = needs_kernels


def route(x: Tensor, logits: Tensor, *parameters: Tensor, capacity: int | None = None) -> Tensor:
    """Gate, plan and layer, as a model calls them."""
    weights, experts = ops.topk_gate(logits, 2)
    priority = None if capacity is None else weights.detach()[:, 0]
    plan = ops.moe_plan(experts, logits.shape[1], capacity, priority)
    return ops.moe_mlp(x, weights, plan, *parameters, "gelu")


def inputs(tokens: int = 12) -> list[Tensor]:
    """x, logits and parameters of a small layer, all wanting gradients."""
    problem = Problem(tokens, 6, 10, 4, 2)
    x, _, *parameters = problem.layer(torch.float32)
    logits = draw(tokens, 4, dtype=torch.float32, device="cpu", seed=11)
    return [x, logits, *parameters]


def test_every_schema_is_one_that_an_op_test_covers_and_is_implemented_for_the_cpu() -> None:
    names = {
        schema.name.removeprefix("m2mkd::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("m2mkd::")
    }
    assert names == set().union(*REGISTERED.values())
    assert all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"m2mkd::{name}", "CPU") for name in names
    )


def test_a_whole_layer_compiled_in_one_graph_gives_eager_values_and_gradients() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    for tokens in (12, 17):  # the second is traced with a symbolic number of tokens
        leaves = inputs(tokens)
        found = compiled(*leaves, capacity=4)
        expected = route(*leaves, capacity=4)
        assert_near(found, expected)
        found_grads = torch.autograd.grad(found.square().sum(), leaves)
        expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
        for a, b in zip(found_grads, expected_grads, strict=True):
            assert_near(a, b)


@pytest.mark.slow
def test_inductor_compiles_it_in_one_graph() -> None:
    torch._dynamo.reset()
    leaves = [t.detach() for t in inputs()]
    assert_near(
        torch.compile(route, fullgraph=True)(*leaves, capacity=4), route(*leaves, capacity=4)
    )


class Layer(torch.nn.Module):
    """A layer for torch.export."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__()
        self.capacity = capacity
        self.parts = torch.nn.ParameterList(t.detach() for t in inputs()[2:])

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Routes x by logits."""
        return route(x, logits, *self.parts, capacity=self.capacity)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("capacity", [None, 4])
def test_exported_with_a_dynamic_number_of_tokens(capacity: int | None, strict: bool) -> None:
    layer = Layer(capacity)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    x, logits = (t.detach() for t in inputs()[:2])
    exported = torch.export.export(
        layer, (x, logits), dynamic_shapes=({0: tokens}, {0: tokens}), strict=strict
    )
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"m2mkd.topk_gate.default", "m2mkd.moe_plan.default", "m2mkd.moe_mlp.default"} <= targets
    for count in (12, 29):
        x, logits = (t.detach() for t in inputs(count)[:2])
        assert_near(exported.module()(x, logits), layer(x, logits).detach())


def test_the_references_trace_without_looking_at_values() -> None:
    torch._dynamo.reset()
    problem = Problem(12, 6, 10, 4, 2)
    leaves = problem.layer(torch.float32)

    def layer(logits: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, experts = reference.topk_gate(logits, 2)
        plan = reference.moe_plan(experts, 4, 5)
        return reference.moe_mlp(x, weights, plan, *parameters, "gelu")

    logits = torch.randn(12, 4)
    arguments = (logits, leaves[0], *leaves[2:])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_near(compiled(*arguments), layer(*arguments))


def gathered(x: Tensor) -> Tensor:
    """Rows of tokens: one op, which stands for all, as they are registered in one way."""
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32)
    return ops.moe_gather(x, reference.moe_plan(experts, 2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_a_kernel_for_every_example() -> None:
    x = torch.randn(4, 3, 5)
    assert torch.equal(torch.func.vmap(gathered)(x), torch.stack([gathered(one) for one in x]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_derivatives_of_a_kernel_are_refused() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(gathered, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            gathered(forward_ad.make_dual(x, x))
        assert torch.equal(gathered(x), torch.cat([x[[0, 1, 2]]] * 2))
    out, tangent = torch.func.jvp(lambda y: y * gathered(x), (x[0],), (x[1],))
    assert torch.equal(out, x[0] * gathered(x))
    assert torch.equal(tangent, x[1] * gathered(x))


def test_functional_gradients_of_a_kernel_are_refused() -> None:
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: gathered(x).sum())(torch.randn(3, 5))


def test_arguments_of_a_kernel_may_be_named() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    weights, experts = torch.ops.m2mkd.topk_gate(mode="softmax_selected", logits=logits, k=2)
    assert torch.equal(experts, ops.topk_gate(logits, 2)[1])
    assert torch.equal(
        torch.autograd.grad(weights.square().sum(), logits)[0],
        torch.autograd.grad(ops.topk_gate(logits, 2)[0].square().sum(), logits)[0],
    )
