"""Times circuit attention against dense attention with a mask and other sparse forms.

    python benchmarks/bench_circuit_attention.py --threads 2
    python benchmarks/bench_circuit_attention.py --sweep degree --threads 2
    python benchmarks/bench_circuit_attention.py --sweep memory
    python benchmarks/bench_circuit_attention.py --device cuda --dtype bfloat16

Every round runs every form once, so that drift of the machine meets all alike; a ratio is the
median over rounds of a form's time divided by that of `sparse` in the same round: how many times
faster the kernel is. `--clock cpu` counts the process's own time and suits a busy machine with
`--threads 1`.

Sweeps:
    density  for each shape (B H U V D) and density, forward and forward with backward
    degree   16 edges a receiver, U = V from 1024 to 16384: nanoseconds per edge and head
    memory   the same sizes: peak memory above what the inputs need, each in its own process

Forms:
    sparse     the kernel, circuit_attention(impl="sparse"), with a bias per edge [N]
    auto       circuit_attention as it chooses
    dense      circuit_attention(impl="dense"), which makes its mask from the biases
    sdpa       scaled_dot_product_attention with a ready float mask [U, V] that wants a gradient
    sdpa_fixed the same, with a mask that wants none
    einsum     two matrix products, mask and softmax
    csr        torch's own sparse matrices head by head: sampled_addmm, segment_reduce, product;
               forward only, as they have no derivative
    flex       compiled FlexAttention with the same biases; forward only on a CPU
"""

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import (
    Clock,
    choose_clock,
    copy_bandwidth,
    machine,
    measure,
    reset_resident_peak,
    resident_peak,
)
from torch import Tensor

from m2mkd import ops

SHAPES = [(4, 8, 1024, 1024, 64), (8, 6, 256, 320, 64)]
DENSITIES = [0.05, 0.1, 0.25, 0.5, 1.0]
SIZES = [1024, 2048, 4096, 8192, 16384]
DEGREE = 16
FORWARD_ONLY = ("csr", "flex")


@dataclass
class Case:
    """Queries, keys, values, a circuit, its biases, and the same as a dense mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    circuit: ops.Circuit
    bias: Tensor
    mask: Tensor | None
    upstream: Tensor

    @staticmethod
    def random(
        shape: tuple[int, ...],
        circuit: ops.Circuit,
        dtype: torch.dtype,
        device: str,
        with_mask: bool = True,
    ) -> "Case":
        """Normal values that want gradients, on a given circuit."""
        batch, heads, receivers, senders, width = shape
        q, k, v, upstream = (
            torch.randn(batch, heads, rows, width).to(device, dtype)
            for rows in (receivers, senders, senders, receivers)
        )
        bias = torch.randn(circuit.num_edges).to(device)
        mask = None
        if with_mask:
            mask = torch.full((receivers, senders), -torch.inf, device=device)
            mask[circuit.receiver_of_edge.long(), circuit.sender.long()] = bias
            mask[mask.amax(dim=1) == -torch.inf] = 0
            mask = mask.to(dtype).requires_grad_()
        leaves = [t.requires_grad_() for t in (q, k, v, bias)]
        return Case(leaves[0], leaves[1], leaves[2], circuit, leaves[3], mask, upstream)


def random_circuit(receivers: int, senders: int, density: float, device: str) -> ops.Circuit:
    """Every edge with the same probability."""
    return ops.Circuit.from_dense(torch.rand(receivers, senders) < density).to(device)


def regular_circuit(size: int, device: str) -> ops.Circuit:
    """DEGREE senders for every receiver, one from each of as many equal ranges of senders."""
    span = size // DEGREE
    senders = torch.randint(span, (size, DEGREE)) + span * torch.arange(DEGREE)
    receivers = torch.arange(size)[:, None].expand_as(senders)
    return ops.Circuit.from_edges(receivers.flatten(), senders.flatten(), size, size).to(device)


def attend(case: Case, impl: str) -> Tensor:
    """This package."""
    return ops.circuit_attention(case.q, case.k, case.v, case.circuit, case.bias, impl=impl)


def sdpa(case: Case) -> Tensor:
    """Dense attention, mask gradient where gradients are taken."""
    return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=case.mask)


def sdpa_fixed(case: Case) -> Tensor:
    """Dense attention with a constant mask."""
    assert case.mask is not None
    return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=case.mask.detach())


def einsum(case: Case) -> Tensor:
    """Attention spelled out."""
    scores = case.q @ case.k.transpose(2, 3) / math.sqrt(case.q.shape[3]) + case.mask
    return scores.softmax(dim=3) @ case.v


def csr(case: Case) -> Tensor:
    """torch.sparse, one head at a time."""
    rows, columns = case.circuit.row_ptr.long(), case.circuit.sender.long()
    size, scale = case.circuit.to_dense().shape, 1 / math.sqrt(case.q.shape[3])
    lengths = rows.diff()
    start = torch.sparse_csr_tensor(rows, columns, case.bias, size)
    out = torch.empty_like(case.q)
    for head_q, head_k, head_v, target in zip(
        *(t.flatten(0, 1) for t in (case.q, case.k, case.v, out)), strict=True
    ):
        scores = torch.sparse.sampled_addmm(start, head_q, head_k.T, alpha=scale).values()
        most = torch.segment_reduce(scores, "max", lengths=lengths)
        weights = (scores - most.repeat_interleave(lengths)).exp()
        total = torch.segment_reduce(weights, "sum", lengths=lengths)
        weights = weights / total.repeat_interleave(lengths)
        target.copy_(torch.sparse_csr_tensor(rows, columns, weights, size) @ head_v)
    return out


def make_flex(case: Case) -> Callable[[Case], Tensor]:
    """Compiled FlexAttention on this case's graph."""
    from torch.nn.attention import flex_attention as flex

    assert case.mask is not None
    edges, mask = case.circuit.to_dense(), case.mask.detach()
    blocks = flex.create_block_mask(
        lambda b, h, u, v: edges[u, v], None, None, *mask.shape, device=str(mask.device)
    )
    torch._dynamo.reset()  # what it makes for a second graph does not compile on a CPU
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def run(case: Case) -> Tensor:
        tensors = [case.q, case.k, case.v]
        if not torch.is_grad_enabled():  # on a CPU it refuses tensors that want gradients
            tensors = [t.detach() for t in tensors]
        out: Tensor = compiled(*tensors, lambda s, b, h, u, v: s + mask[u, v], block_mask=blocks)
        return out

    return run


def forms_of(case: Case, names: list[str]) -> dict[str, Callable[[Case], Tensor]]:
    """The chosen forms by name."""
    known: dict[str, Callable[[Case], Tensor]] = {
        impl: (lambda c, impl=impl: attend(c, impl))  # type: ignore[misc]
        for impl in ("sparse", "auto", "dense")
    }
    known |= {f.__name__: f for f in (sdpa, sdpa_fixed, einsum, csr)}
    if "flex" in names:
        known["flex"] = make_flex(case)
    return {name: known[name] for name in ["sparse", *names] if name in known}


def run_forward(form: Callable[[Case], Tensor], case: Case) -> None:
    """One pass without gradients."""
    with torch.no_grad():
        form(case)


def run_both(form: Callable[[Case], Tensor], case: Case) -> None:
    """One pass with the gradient of everything that the form depends on."""
    leaves = [case.q, case.k, case.v, case.bias, *([] if case.mask is None else [case.mask])]
    torch.autograd.grad(form(case), leaves, case.upstream, allow_unused=True)


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    """One line for each form."""
    print(title)
    for name, r in results.items():
        spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
        print(f"  {name:10} {r['ms']:9.2f} ms   {r['ratio']:6.2f} ({spread})")


def sweep_density(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Every form for every shape and density."""
    everything: dict[str, Any] = {}
    rate = copy_bandwidth(options.device, clock) if options.device == "cuda" else 0.0
    for shape in options.shapes:
        for density in options.densities:
            torch.manual_seed(0)
            circuit = random_circuit(shape[2], shape[3], density, options.device)
            case = Case.random(shape, circuit, options.dtype, options.device)
            forms = forms_of(case, options.forms)
            for label, run in (("forward", run_forward), ("forward+backward", run_both)):
                skipped = () if run is run_forward else FORWARD_ONLY
                if options.device == "cuda":
                    skipped = tuple(name for name in skipped if name != "flex")
                runs = {
                    name: (lambda run=run, form=form, case=case: run(form, case))
                    for name, form in forms.items()
                    if name not in skipped
                }
                results = measure(runs, "sparse", options.rounds, clock)
                title = f"B H U V D = {' '.join(map(str, shape))}, {100 * density:g} %, {label}"
                everything[title] = results
                if not options.json:
                    print_table(title, results)
            if rate and not options.json:
                print_bandwidth(case, everything, rate)
    return everything


def print_bandwidth(case: Case, everything: dict[str, Any], rate: float) -> None:
    """What the last forward pass moved, in parts of what a copy moves in the same time."""
    results = [r for title, r in everything.items() if title.endswith("forward")][-1]
    seconds = results["sparse"]["ms"] / 1e3
    once = sum(t.numel() * t.element_size() for t in (case.q, case.q, case.k, case.v))
    edges = case.circuit.num_edges * case.q.shape[0] * case.q.shape[1]
    gathered = 2 * edges * case.q.shape[3] * case.q.element_size()
    print(
        f"  copy {rate / 1e9:.0f} GB/s; sparse forward: {once / seconds / rate:.2f} of it counting "
        f"every tensor once, {(once + gathered) / seconds / rate:.2f} counting every gathered row"
    )


def sweep_degree(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Time of the kernel per edge and head as the graph grows at a fixed degree."""
    cases = {}
    for size in options.sizes:
        torch.manual_seed(0)
        circuit = regular_circuit(size, options.device)
        shape = (1, options.heads, size, size, 64)
        cases[size] = Case.random(shape, circuit, options.dtype, options.device, with_mask=False)
    forms = forms_of(cases[options.sizes[0]], [])
    everything: dict[str, Any] = {}
    for label, run in (("forward", run_forward), ("forward+backward", run_both)):
        runs = {
            str(size): (lambda run=run, case=case: run(forms["sparse"], case))
            for size, case in cases.items()
        }
        results = measure(runs, str(options.sizes[0]), options.rounds, clock)
        first = None
        for size, r in zip(options.sizes, results.values(), strict=True):
            nanoseconds = 1e6 * r["ms"] / (cases[size].circuit.num_edges * options.heads)
            first = first or nanoseconds
            everything[f"{label} U=V={size}"] = nanoseconds
            if not options.json:
                print(
                    f"{label:17} U=V={size:6}  {nanoseconds:6.1f} ns an edge, "
                    f"{nanoseconds / first:.2f} of the first"
                )
    return everything


def memory_of(size: int, heads: int, device: str) -> float:
    """MiB that one forward and backward pass needs above what was there before it."""
    circuit = regular_circuit(size, device)
    case = Case.random((1, heads, size, size, 64), circuit, torch.float32, device, with_mask=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_both(lambda c: attend(c, "sparse"), case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = reset_resident_peak()
    run_both(lambda c: attend(c, "sparse"), case)
    return resident_peak() - before


def sweep_memory(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Peak memory of a pass, each size in a fresh process."""
    del clock
    everything: dict[str, Any] = {}
    for size in options.sizes:
        command = [sys.executable, __file__, "--sweep", "memory", "--sizes", str(size), "--child"]
        command += ["--device", options.device, "--heads", str(options.heads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mebibytes = float(done.stdout)
        everything[f"U=V={size}"] = mebibytes
        if not options.json:
            scores = options.heads * size * size * 4 / 2**20
            print(
                f"U=V={size:6}  {mebibytes:7.1f} MiB above the inputs; dense scores alone "
                f"{scores:.0f} MiB"
            )
    return everything


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sweep", choices=["density", "degree", "memory"], default="density")
    parser.add_argument("--shape", type=int, nargs=5, action="append", metavar=tuple("BHUVD"))
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--heads", type=int, default=4, help="of the degree and memory sweeps")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--forms", nargs="+", default=["auto", "dense", "sdpa", "sdpa_fixed", "einsum", "csr"]
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shapes = [tuple(shape) for shape in options.shape or SHAPES]
    options.dtype = getattr(torch, options.dtype)
    return options


def main() -> None:
    """Prints tables, or one JSON line."""
    options = parse()
    warnings.filterwarnings("ignore", message="Sparse")  # torch's, about its CSR tensors
    torch.set_num_threads(options.threads)
    if options.child:
        print(memory_of(options.sizes[0], options.heads, options.device))
        return
    clock = choose_clock(options.device, options.clock)
    if not options.json:
        print(f"{machine(options.device)}, {options.threads} threads, {options.clock} clock")
    sweep = {"density": sweep_density, "degree": sweep_degree, "memory": sweep_memory}
    everything = sweep[options.sweep](options, clock)
    if options.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
