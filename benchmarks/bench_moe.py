"""Times the MoE layer on the CPU against the bare expert GEMMs and other ways to dispatch.

    python benchmarks/bench_moe.py --tokens 1576 12608 --threads 2

Every round runs every form once, so that drift of the machine meets all alike; what is reported is
the median over rounds of each form's time divided by the floor's in the same round. `--clock cpu`
counts the process's own time and suits a busy machine with `--threads 1`.

Forms (float32, width 384, hidden 1536, 8 experts, 2 choices, erf GELU, no dropping):
    floor    the expert GEMMs alone, into buffers that are already there
    m2mkd    topk_gate + moe_plan + moe_mlp
    loop     for every expert: select rows, two linear layers, index_add
    grouped  sort once, torch.nn.functional.grouped_mm with biases gathered by row
    buffer   one-hot cumulative sum for slots, [E, capacity, D] buffer and bmm: the idea of Tutel's
             CPU path, written anew here because Tutel is not on the package index
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    def random(tokens: int) -> "Layer":
        """A layer with values of the size a trained one has."""
        torch.manual_seed(0)
        return Layer(
            torch.randn(tokens, WIDTH, requires_grad=True),
            torch.randn(tokens, EXPERTS, requires_grad=True),
            torch.randn(EXPERTS, HIDDEN, WIDTH).mul_(0.05).requires_grad_(),
            torch.randn(EXPERTS, HIDDEN).mul_(0.1).requires_grad_(),
            torch.randn(EXPERTS, WIDTH, HIDDEN).mul_(0.03).requires_grad_(),
            torch.randn(EXPERTS, WIDTH).mul_(0.1).requires_grad_(),
        )

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
    token = torch.arange(layer.x.shape[0]).repeat(CHOICES)
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
        self.rows = torch.randn(self.bounds[-1], WIDTH)
        self.kept = torch.randn(self.bounds[-1], HIDDEN)
        self.hidden, self.out = torch.randn(most, HIDDEN), torch.randn(most, WIDTH)
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


def measure(
    forms: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median and quartiles of the ratio to the floor of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            start = clock()
            form()
            seconds[name].append(clock() - start)
    results = {}
    for name, times in seconds.items():
        ratios = [t / f for t, f in zip(times, seconds["floor"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        results[name] = {
            "ms": 1e3 * statistics.median(times),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }
    return results


def main() -> None:
    """Prints one table per number of tokens and direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1576, 12608])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--forms", nargs="+", default=["m2mkd", "loop", "grouped", "buffer"])
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    chosen = {
        f.__name__: f for f in (m2mkd, loop, grouped, buffer) if f.__name__ in arguments.forms
    }
    everything = {}
    for tokens in arguments.tokens:
        layer = Layer.random(tokens)
        floor = Floor(layer)
        upstream = torch.randn(tokens, WIDTH)

        def backward(form: Callable[[Layer], Tensor], layer=layer, upstream=upstream) -> None:  # type: ignore[no-untyped-def]
            torch.autograd.grad(form(layer), layer.leaves(), upstream)

        with torch.no_grad():
            forward = {n: (lambda f=f, layer=layer: f(layer)) for n, f in chosen.items()}
            one = measure({"floor": floor.forward, **forward}, arguments.rounds, clock)
        both = {n: (lambda f=f, run=backward: run(f)) for n, f in chosen.items()}
        two = measure({"floor": floor.both, **both}, arguments.rounds, clock)
        for label, results in (("forward", one), ("forward+backward", two)):
            everything[f"T={tokens} {label}"] = results
            if not arguments.json:
                print(f"T={tokens} {label}, {arguments.threads} threads, {arguments.clock} clock")
                for name, r in results.items():
                    spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
                    print(f"  {name:8} {r['ms']:8.1f} ms   {r['ratio']:.3f} ({spread})")
    if arguments.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
