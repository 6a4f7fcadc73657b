"""Which tensors compiled kernels serve, and the comparison that CUDA kernels must pass first.

No CUDA kernel of this package has a run on real hardware on record. So the first use on a GPU runs
`selftest` there, once per process and device, and what disagrees with the references is not used.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from m2mkd.ops import reference
from m2mkd.ops._checks import MoEPlan
from m2mkd.ops._load import EXTENSION, ExtensionWarning
from m2mkd.ops.circuit import Circuit

# Of the largest value; half types round every stage, at other places than the reference.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_passed: dict[int, bool] = {}

# Kernel, reference and inputs.
_Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def selftest(device: torch.device | str) -> dict[str, str]:
    """Compares every kernel and its gradients with the reference on `device`.

    Args:
        device: Such as "cuda:0" or "cpu"; kernels for it must be loaded (see `status`).

    Returns:
        "ok" or what went wrong, by op and dtype, such as {"moe_mlp float32": "ok"}.
    """
    results = {}
    for dtype in _TOLERANCE:
        for name, (kernel, plain, inputs) in _cases(torch.device(device), dtype).items():
            try:
                results[f"{name} {str(dtype).removeprefix('torch.')}"] = _compare(
                    kernel, plain, inputs
                )
            except RuntimeError as error:
                results[f"{name} {str(dtype).removeprefix('torch.')}"] = str(error).splitlines()[0]
    return results


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on `device`; the first CUDA use tests them."""
    if device.type != "cuda":
        return EXTENSION.cpu and device.type != "mps"
    if not EXTENSION.cuda:
        return False
    index = device.index or 0
    if index not in _passed:
        if torch.compiler.is_compiling():
            return True
        _passed[index] = _passes(device)
    return _passed[index]


def _passes(device: torch.device) -> bool:
    """Runs the self-test; warns and returns False where anything disagrees."""
    failures = {name: found for name, found in selftest(device).items() if found != "ok"}
    if failures:
        warnings.warn(
            f"CUDA kernels disagree with their references on {device} and are not used, so ops run "
            f"slowly: {failures}; please report this with the output of `m2mkd info`",
            ExtensionWarning,
            stacklevel=2,
        )
    return not failures


def _compare(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> str:
    """ "ok", or the first of the values and gradients that disagree."""
    pairs = []
    for function in (kernel, plain):
        out = function(*inputs)
        leaves = [t for t in inputs if t.requires_grad]
        pairs.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for i, (found, expected) in enumerate(zip(*pairs, strict=True)):
        scale = float(expected.detach().float().abs().max())
        error = float((found.detach().float() - expected.detach().float()).abs().max())
        if not error <= _TOLERANCE[inputs[0].dtype] * max(scale, 1e-3):
            return f"{'value' if i == 0 else f'gradient {i}'} differs by {error:.2e} of {scale:.2e}"
    return "ok"


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, _Case]:
    """The cases of every op."""
    return {**_moe_cases(device, dtype), **_circuit_cases(device, dtype)}


def _circuit_cases(device: torch.device, dtype: torch.dtype) -> dict[str, _Case]:
    """Few and many heads, which the CUDA kernels serve differently (cuda/circuit_launch.h)."""
    generator = torch.Generator().manual_seed(1)
    cases: dict[str, _Case] = {}
    for name, batch, heads in (("circuit_attention", 2, 3), ("circuit_attention staged", 8, 24)):
        links_UV = torch.rand(20, 24, generator=generator) < 0.6
        links_UV[7] = links_UV[:, 5] = False
        circuit = Circuit.from_dense(links_UV).to(device)
        sizes = [(batch, heads, length, 16) for length in (20, 24, 24)]
        q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        bias = torch.randn(batch, circuit.num_edges, generator=generator).to(device)
        graph = [t for name, t in circuit.tensors().items() if name != "receiver_of_edge"]

        def kernel(*inputs: Tensor, graph: list[Tensor] = graph) -> Tensor:
            out: Tensor = torch.ops.m2mkd.circuit_attention(*inputs, *graph, 0.25)[0]
            return out

        def plain(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor, circuit: Circuit = circuit
        ) -> Tensor:
            return reference.circuit_attention(q, k, v, circuit, bias, 0.25)

        cases[name] = (kernel, plain, [t.requires_grad_() for t in (q, k, v, bias)])
    return cases


def _moe_cases(device: torch.device, dtype: torch.dtype) -> dict[str, _Case]:
    """Kernel, reference and inputs of each op; with a dropped choice and a full expert."""
    ops = torch.ops.m2mkd
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator).to(device, dtype)
        return values.requires_grad_()

    tokens, width, hidden, num, k, capacity = 300, 24, 40, 5, 2, 110
    logits, x = draw(tokens, num), draw(tokens, width)
    _, experts = reference.topk_gate(logits.detach(), k)
    plan = reference.moe_plan(experts, num, capacity)
    weights = torch.rand(tokens, k, generator=generator).to(device).requires_grad_()
    rows = draw(plan.token_of_M.shape[0], width)
    layer = [
        draw(num, hidden, width),
        draw(num, hidden),
        draw(num, width, hidden),
        draw(num, width),
    ]

    def planned(x: Tensor) -> Tensor:
        found = MoEPlan(*ops.moe_plan(experts, None, num, capacity))
        return reference.moe_gather(x, found._replace(token_of_M=found.token_of_M[: len(rows)]))

    return {
        "topk_gate": (
            lambda z: ops.topk_gate(z, k, "softmax_all")[0],
            lambda z: reference.topk_gate(z, k, "softmax_all")[0],
            [logits],
        ),
        "moe_plan": (planned, lambda x: reference.moe_gather(x, plan), [x]),
        "moe_gather": (
            lambda x: ops.moe_gather(x, plan.row_of_TK, plan.token_of_M),
            lambda x: reference.moe_gather(x, plan),
            [x],
        ),
        "grouped_linear": (
            lambda r, w, b: ops.grouped_linear(r, w, b, plan.offsets),
            lambda r, w, b: reference.grouped_linear(r, w, b, plan.offsets),
            [rows, layer[0], layer[1]],
        ),
        "moe_combine": (
            lambda r, w: ops.moe_combine(r, w, plan.row_of_TK),
            lambda r, w: reference.moe_combine(r, w, plan),
            [rows, weights],
        ),
        "moe_mlp": (
            lambda x, w, *p: ops.moe_mlp(x, w, *plan, *p, "gelu", True)[0],
            lambda x, w, a, b, c, d: reference.moe_mlp(x, w, plan, a, b, c, d, "gelu"),
            [x, weights, *layer],
        ),
    }
