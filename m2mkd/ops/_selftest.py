"""Which tensors compiled kernels serve, and the comparison that CUDA kernels must pass first.

No CUDA kernel of this package has a run on real hardware on record. So the first use on a GPU runs
`selftest` there, and where anything disagrees with the references no CUDA kernel is used. That a
device has passed is kept on disk, per build of the kernels, torch and kind of device; a failure is
not, so every process says it again.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2mkd.ops import reference
from m2mkd.ops._checks import ACTIVATIONS, GATE_MODES, MoEPlan
from m2mkd.ops._load import CUDA_LIBRARY, EXTENSION, ExtensionWarning
from m2mkd.ops.circuit import Circuit

# Of the largest value; half types round every stage, at other places than the reference.
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-10,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

# By index of the CUDA device, for this process.
_verdicts: dict[int, bool] = {}

# A kernel's op, its reference, and their inputs; those that want gradients are compared in these.
_Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


class Finding(NamedTuple):
    """How far a kernel is from its reference.

    Attributes:
        error: Largest difference of values and gradients, as a part of the largest value.
        problem: What is wrong, or an empty string.
    """

    error: float
    problem: str


def selftest(device: torch.device | str) -> dict[str, Finding]:
    """Compares every kernel and its gradients with the reference on `device`.

    Args:
        device: Such as "cuda:0" or "cpu"; kernels for it must be loaded (see `status`).

    Returns:
        Findings by op and dtype, such as {"moe_mlp float32": Finding(3e-7, "")}.
    """
    device = torch.device(device)
    # The first use may lie in a region that records no gradients, or computes in another dtype.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        return {
            f"{name} {str(dtype).removeprefix('torch.')}": _worst(cases, dtype)
            for dtype in _TOLERANCE
            for name, cases in _cases(device, dtype).items()
        }


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on `device`; the first CUDA use tests them."""
    if device.type != "cuda":
        return EXTENSION.cpu and device.type != "mps"
    return EXTENSION.cuda and _is_trusted(device.index or 0)


# torch.compile calls it while it traces, and takes the answer as a constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_trusted(index: int) -> bool:
    """Whether kernels passed on this CUDA device, now or by the record on disk."""
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return True  # torch.export traces with tensors that hold nothing to compare
    if index not in _verdicts:
        device = torch.device("cuda", index)
        record = _record(device)
        _verdicts[index] = record.is_file() or _passes(device)
        if _verdicts[index] and not record.is_file():
            _keep(record, device)
    return _verdicts[index]


def _passes(device: torch.device) -> bool:
    """Runs the self-test; warns and returns False where anything disagrees."""
    failures = {name: found.problem for name, found in selftest(device).items() if found.problem}
    if failures:
        warnings.warn(
            f"CUDA kernels disagree with their references on {device} and are not used, so ops run "
            f"slowly: {failures}; please report this with the output of `m2mkd info`",
            ExtensionWarning,
            stacklevel=2,
        )
    return not failures


def _facts(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "kernels": hashlib.sha256(CUDA_LIBRARY.read_bytes()).hexdigest(),
    }


def _record(device: torch.device) -> Path:
    """The file whose presence says that this build passed on this kind of device."""
    name = hashlib.sha256(json.dumps(_facts(device)).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "m2mkd" / f"selftest-{name}.json"


def _keep(record: Path, device: torch.device) -> None:
    """Writes the record; where that cannot be done, the next process tests again."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(_facts(device), indent=1))
    except OSError:
        return


def _worst(cases: list[_Case], dtype: torch.dtype) -> Finding:
    """The first finding with a problem, or the one with the largest error."""
    findings = []
    for case in cases:
        try:
            findings.append(_compare(*case, _TOLERANCE[dtype]))
        except RuntimeError as error:
            findings.append(Finding(float("nan"), str(error).splitlines()[0]))
    return max(findings, key=lambda found: (bool(found.problem), found.error))


def _compare(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    tolerance: float,
) -> Finding:
    """Compares values and gradients; names the first that disagree."""
    results = []
    for function in (kernel, plain):
        out = function(*inputs)
        leaves = [t for t in inputs if t.requires_grad]
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    worst = 0.0
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        scale = max(1e-3, float(expected.detach().double().abs().max()))
        error = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
        if not error <= tolerance:
            what = "value" if i == 0 else f"gradient {i}"
            return Finding(error, f"{what} differs by {error:.2e} of the largest, {scale:.2e}")
        worst = max(worst, error)
    return Finding(worst, "")


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, list[_Case]]:
    """The comparisons for each op."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(device, dtype).requires_grad_()

    return {**_moe_cases(draw), "circuit_attention": _circuit_cases(draw, device)}


def _moe_cases(draw: Callable[..., Tensor]) -> dict[str, list[_Case]]:
    """A layer of 5 experts with a dropped choice and a full expert; widths in and out of step."""
    found: dict[str, list[_Case]] = {"topk_gate": [], "moe_plan": [], "moe_mlp": []}
    for tokens, width, hidden, capacity in ((300, 24, 40, 110), (37, 7, 13, None)):
        logits = draw(tokens, 5)
        experts = reference.topk_gate(logits.detach(), 2)[1]
        plan = reference.moe_plan(experts, 5, capacity)
        layer = [draw(5, hidden, width), draw(5, hidden), draw(5, width, hidden), draw(5, width)]
        x, rows = draw(tokens, width), draw(plan.token_of_M.shape[0], width)
        weights = draw(tokens, 2).detach().to(_wide(x)).requires_grad_()
        found["topk_gate"] += [_gate_case(logits, mode) for mode in GATE_MODES]
        found["moe_plan"].append(_plan_case(x, experts, capacity, plan))
        # The step in relu's slope makes a difference of rounding a large one.
        names = ACTIVATIONS if x.dtype == torch.float64 else ("gelu", "gelu_tanh", "silu")
        found["moe_mlp"] += [_mlp_case([x, weights, *layer], plan, name) for name in names]
        for name, case in _row_cases(x, rows, weights, layer, plan).items():
            found.setdefault(name, []).append(case)
    return found


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of combine weights and of biases of edges."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gate_case(logits: Tensor, mode: str) -> _Case:
    return (
        lambda z: torch.ops.m2mkd.topk_gate(z, 2, mode)[0],
        lambda z: reference.topk_gate(z, 2, mode)[0],
        [logits],
    )


def _plan_case(x: Tensor, experts: Tensor, capacity: int | None, plan: MoEPlan) -> _Case:
    """Plans are compared by the rows they gather."""

    def planned(x: Tensor) -> Tensor:
        made = MoEPlan(*torch.ops.m2mkd.moe_plan(experts, None, 5, capacity))
        num_rows = plan.token_of_M.shape[0]
        return reference.moe_gather(x, made._replace(token_of_M=made.token_of_M[:num_rows]))

    return planned, lambda x: reference.moe_gather(x, plan), [x]


def _mlp_case(inputs: list[Tensor], plan: MoEPlan, activation: str) -> _Case:
    return (
        lambda x, w, *p: torch.ops.m2mkd.moe_mlp(x, w, *plan, *p, activation, True)[0],
        lambda x, w, a, b, c, d: reference.moe_mlp(x, w, plan, a, b, c, d, activation),
        inputs,
    )


def _row_cases(
    x: Tensor, rows: Tensor, weights: Tensor, layer: list[Tensor], plan: MoEPlan
) -> dict[str, _Case]:
    """The ops on rows sorted by expert."""
    kernels = torch.ops.m2mkd
    return {
        "moe_gather": (
            lambda x: kernels.moe_gather(x, plan.row_of_TK, plan.token_of_M),
            lambda x: reference.moe_gather(x, plan),
            [x],
        ),
        "grouped_linear": (
            lambda r, w, b: kernels.grouped_linear(r, w, b, plan.offsets),
            lambda r, w, b: reference.grouped_linear(r, w, b, plan.offsets),
            [rows, layer[0], layer[1]],
        ),
        "moe_combine": (
            lambda r, w: kernels.moe_combine(r, w, plan.row_of_TK),
            lambda r, w: reference.moe_combine(r, w, plan),
            [rows, weights],
        ),
    }


def _circuit_cases(draw: Callable[..., Tensor], device: torch.device) -> list[_Case]:
    """Few and many heads, which the CUDA kernels serve differently (cuda/circuit_launch.h)."""
    found: list[_Case] = []
    for batch, heads in ((2, 3), (8, 24)):
        links_UV = draw(20, 24).detach().cpu() < 0.3
        links_UV[7] = links_UV[:, 5] = False
        circuit = Circuit.from_dense(links_UV).to(device)
        q, k, v = (draw(batch, heads, length, 16) for length in (20, 24, 24))
        bias = draw(batch, circuit.num_edges).detach().to(_wide(q)).requires_grad_()
        graph = [t for name, t in circuit.tensors().items() if name != "receiver_of_edge"]

        def kernel(*inputs: Tensor, graph: list[Tensor] = graph) -> Tensor:
            out: Tensor = torch.ops.m2mkd.circuit_attention(*inputs, *graph, 0.25)[0]
            return out

        def plain(*inputs: Tensor, circuit: Circuit = circuit) -> Tensor:
            q, k, v, bias = inputs
            return reference.circuit_attention(q, k, v, circuit, bias, 0.25)

        found.append((kernel, plain, [q, k, v, bias]))
    return found
