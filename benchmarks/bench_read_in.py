"""Times folded read-in attention against the literal form of the published code.

    python benchmarks/bench_read_in.py --threads 2

64 latents of width 384 with 6 heads, float32, batch 8. Both forms run in every round, so that drift
of the machine meets both alike; what is reported is the median over rounds of the literal form's
time divided by the folded one's. `--clock cpu` counts the process's own time and suits a busy
machine with `--threads 1`.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from m2mkd import ops
from m2mkd.ops import reference

BATCH, LATENTS, WIDTH, HEADS = 8, 64, 384, 6


def inputs(tokens: int) -> list[Tensor]:
    """q, x, key_weight, value_weight, key_scale, value_scale, value_bias, all wanting gradients."""
    torch.manual_seed(0)
    head_width = WIDTH // HEADS
    tensors = [
        torch.randn(BATCH, HEADS, LATENTS, head_width),
        torch.randn(BATCH, tokens, WIDTH),
        torch.randn(WIDTH, WIDTH) * WIDTH**-0.5,
        torch.randn(WIDTH, WIDTH) * WIDTH**-0.5,
        torch.rand(LATENTS, WIDTH) + 0.5,
        torch.rand(LATENTS, WIDTH) + 0.5,
        torch.randn(WIDTH),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def forward(form: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """One pass without gradients."""
    with torch.no_grad():
        form(*tensors)


def both(form: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """One pass with every gradient."""
    torch.autograd.grad(form(*tensors).sum(), tensors)


def milliseconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Time of one run."""
    start = clock()
    run()
    return 1e3 * (clock() - start)


def main() -> None:
    """Prints one line per number of tokens and direction."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 784])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    results = {}
    for tokens in arguments.tokens:
        tensors = inputs(tokens)
        for run in (forward, both):
            folded = functools.partial(run, ops.read_in_attention, tensors)
            literal = functools.partial(run, reference.read_in_attention, tensors)
            folded()
            rounds = []
            for _ in range(arguments.rounds):
                # The folded form is short: its median of five stands for one run.
                short = statistics.median(milliseconds(folded, clock) for _ in range(5))
                rounds.append((short, milliseconds(literal, clock)))
            name = f"V={tokens} {'forward' if run is forward else 'forward+backward'}"
            results[name] = {
                "folded_ms": statistics.median(short for short, _ in rounds),
                "literal_ms": statistics.median(long for _, long in rounds),
                "ratio": statistics.median(long / short for short, long in rounds),
            }
            if not arguments.json:
                r = results[name]
                print(
                    f"{name:24} folded {r['folded_ms']:8.1f} ms   literal {r['literal_ms']:9.1f} ms"
                    f"   ratio {r['ratio']:.1f}"
                )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
