"""Times the MoE layer against the bare expert GEMMs and other ways to dispatch.

    python benchmarks/bench_moe.py --tokens 1576 12608 --threads 2
    python benchmarks/bench_moe.py --tokens 12608 65536 --device cuda --dtype bfloat16

Every round runs every form once, so that drift of the machine meets all alike; what is reported is
the median over rounds of each form's time divided by the floor's in the same round. `--clock cpu`
counts the process's own time and suits a busy machine with `--threads 1`.

Forms (width 384, hidden 1536, 8 experts, 2 choices, erf GELU, no dropping):
    floor    the expert GEMMs alone, into buffers that are already there
    m2mkd    topk_gate + moe_plan + moe_mlp
    loop     for every expert: select rows, two linear layers, index_add
    grouped  sort once, torch.nn.functional.grouped_mm with biases gathered by row
    buffer   one-hot cumulative sum for slots, [E, capacity, D] buffer and bmm: the idea of Tutel's
             CPU path, written anew here because Tutel is not on the package index

On a GPU it also says what moe_gather and moe_combine move, in parts of what a copy moves in
the same time.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import Clock, choose_clock, copy_bandwidth, machine, measure
from torch import Tensor

from m2mkd import ops

WIDTH, HIDDEN, EXPERTS, CHOICES = 384, 1536, 8, 2


@dataclass
class Layer:
    """Tokens, router logits and expert parameters, all wanting gradients."""

    x: Tensor
    logits: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    @staticmethod
    def random(tokens: int, device: str, dtype: torch.dtype) -> "Layer":
        """A layer with values of the size a trained one has."""
        torch.manual_seed(0)
        tensors = [
            torch.randn(tokens, WIDTH),
            torch.randn(tokens, EXPERTS),
            torch.randn(EXPERTS, HIDDEN, WIDTH).mul_(0.05),
            torch.randn(EXPERTS, HIDDEN).mul_(0.1),
            torch.randn(EXPERTS, WIDTH, HIDDEN).mul_(0.03),
            torch.randn(EXPERTS, WIDTH).mul_(0.1),
        ]
        return Layer(*(t.to(device, dtype).requires_grad_() for t in tensors))

    def leaves(self) -> list[Tensor]:
        """Everything a backward pass has to reach."""
        return list(vars(self).values())


def gate(layer: Layer) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen logits, in plain PyTorch."""
    values, experts = layer.logits.topk(CHOICES, dim=1)
    return values.softmax(dim=1), experts


def m2mkd(layer: Layer) -> Tensor:
    """This package."""
    weights, experts = ops.topk_gate(layer.logits, CHOICES)
    plan = ops.moe_plan(experts, EXPERTS)
    return ops.moe_mlp(layer.x, weights, plan, *layer.leaves()[2:], "gelu")


def loop(layer: Layer) -> Tensor:
    """A loop over experts with index_add."""
    weights, experts = gate(layer)
    out = torch.zeros_like(layer.x)
    for e in range(EXPERTS):
        token, choice = torch.where(experts == e)
        hidden = F.gelu(F.linear(layer.x[token], layer.fc1_weight[e], layer.fc1_bias[e]))
        rows = F.linear(hidden, layer.fc2_weight[e], layer.fc2_bias[e])
        out = out.index_add(0, token, rows * weights[token, choice, None])
    return out


def grouped(layer: Layer) -> Tensor:
    """Rows sorted by expert and torch's grouped GEMM."""
    weights, experts = gate(layer)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    expert = flat[order]
    ends = flat.bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
    rows = layer.x.index_select(0, order // CHOICES)
    hidden = F.grouped_mm(rows, layer.fc1_weight.transpose(1, 2), offs=ends)
    hidden = F.gelu(hidden + layer.fc1_bias[expert])
    rows = F.grouped_mm(hidden, layer.fc2_weight.transpose(1, 2), offs=ends)
    rows = (rows + layer.fc2_bias[expert]) * weights.flatten()[order, None]
    return torch.zeros_like(layer.x).index_add(0, order // CHOICES, rows)


def buffer(layer: Layer) -> Tensor:
    """Slots by one-hot cumulative sum, a buffer as long as the fullest expert, and bmm."""
    weights, experts = gate(layer)
    flat = experts.T.flatten()
    slots = F.one_hot(flat, EXPERTS).cumsum(0).gather(1, flat[:, None])[:, 0] - 1
    capacity = int(slots.max()) + 1
    place = flat * capacity + slots
    token = torch.arange(layer.x.shape[0], device=layer.x.device).repeat(CHOICES)
    rows = layer.x.new_zeros(EXPERTS * capacity, WIDTH).index_copy(0, place, layer.x[token])
    rows = rows.view(EXPERTS, capacity, WIDTH)
    hidden = F.gelu(torch.baddbmm(layer.fc1_bias[:, None], rows, layer.fc1_weight.transpose(1, 2)))
    rows = torch.baddbmm(layer.fc2_bias[:, None], hidden, layer.fc2_weight.transpose(1, 2))
    picked = rows.flatten(0, 1)[place] * weights.T.flatten()[:, None]
    return picked.view(CHOICES, -1, WIDTH).sum(0)


class Floor:
    """The GEMMs of forward and backward on rows that are already sorted, and nothing else."""

    def __init__(self, layer: Layer) -> None:
        with torch.no_grad():
            _, experts = ops.topk_gate(layer.logits, CHOICES)
            self.bounds = ops.moe_plan(experts, EXPERTS).offsets.tolist()
        most = max(self.bounds[e + 1] - self.bounds[e] for e in range(EXPERTS))
        self.rows, self.kept, self.hidden, self.out = (
            torch.randn(rows, width).to(layer.x)
            for rows, width in (
                (self.bounds[-1], WIDTH),
                (self.bounds[-1], HIDDEN),
                (most, HIDDEN),
                (most, WIDTH),
            )
        )
        self.fc1, self.fc2 = layer.fc1_weight.detach(), layer.fc2_weight.detach()
        self.grad1, self.grad2 = torch.empty_like(self.fc1), torch.empty_like(self.fc2)

    def forward(self) -> None:
        """Two GEMMs per expert."""
        for e in range(EXPERTS):
            low, high = self.bounds[e], self.bounds[e + 1]
            hidden, out = self.hidden[: high - low], self.out[: high - low]
            torch.mm(self.rows[low:high], self.fc1[e].T, out=hidden)
            torch.mm(hidden, self.fc2[e].T, out=out)

    def both(self) -> None:
        """Six GEMMs per expert."""
        self.forward()
        for e in range(EXPERTS):
            low, high = self.bounds[e], self.bounds[e + 1]
            hidden, out = self.hidden[: high - low], self.out[: high - low]
            rows = self.rows[low:high]
            torch.mm(rows, self.fc2[e], out=hidden)
            torch.mm(rows.T, self.kept[low:high], out=self.grad2[e])
            torch.mm(hidden.T, rows, out=self.grad1[e])
            torch.mm(hidden, self.fc1[e], out=out)


def print_bandwidth(layer: Layer, rate: float, rounds: int, clock: Clock) -> None:
    """What gather and combine move, read and written, against a copy's `rate` in bytes a second."""
    with torch.no_grad():
        weights, experts = ops.topk_gate(layer.logits, CHOICES)
        plan = ops.moe_plan(experts, EXPERTS)
        rows = ops.moe_gather(layer.x, plan)
        results = measure(
            {
                "gather": lambda: ops.moe_gather(layer.x, plan),
                "combine": lambda: ops.moe_combine(rows, weights, plan),
            },
            "gather",
            rounds,
            clock,
        )
    moved = (layer.x.numel() + rows.numel()) * rows.element_size()
    for name, r in results.items():
        share = moved / (r["ms"] / 1e3) / rate
        print(f"  {name:8} {r['ms']:8.3f} ms   {share:.2f} of a copy's {rate / 1e9:.0f} GB/s")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1576, 12608])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forms", nargs="+", default=["m2mkd", "loop", "grouped", "buffer"])
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    return parser.parse_args()


def main() -> None:
    """Prints one table per number of tokens and direction."""
    options = parse()
    torch.set_num_threads(options.threads)
    clock = choose_clock(options.device, options.clock)
    chosen = {f.__name__: f for f in (m2mkd, loop, grouped, buffer) if f.__name__ in options.forms}
    rate = copy_bandwidth(options.device, clock) if options.device == "cuda" else 0.0
    everything = {}
    if not options.json:
        print(f"{machine(options.device)}, {options.threads} threads, {options.clock} clock")
    for tokens in options.tokens:
        layer = Layer.random(tokens, options.device, getattr(torch, options.dtype))
        floor = Floor(layer)
        upstream = torch.randn(tokens, WIDTH).to(layer.x)

        def backward(form: Callable[[Layer], Tensor], layer=layer, upstream=upstream) -> None:  # type: ignore[no-untyped-def]
            torch.autograd.grad(form(layer), layer.leaves(), upstream)

        with torch.no_grad():
            forward = {n: (lambda f=f, layer=layer: f(layer)) for n, f in chosen.items()}
            one = measure({"floor": floor.forward, **forward}, "floor", options.rounds, clock)
        both = {n: (lambda f=f, run=backward: run(f)) for n, f in chosen.items()}
        two = measure({"floor": floor.both, **both}, "floor", options.rounds, clock)
        for label, results in (("forward", one), ("forward+backward", two)):
            everything[f"T={tokens} {label}"] = results
            if not options.json:
                print(f"T={tokens} {label}")
                for name, r in results.items():
                    spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
                    print(f"  {name:8} {r['ms']:8.1f} ms   {r['ratio']:.3f} ({spread})")
        if rate and not options.json:
            print_bandwidth(layer, rate, options.rounds, clock)
    if options.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
