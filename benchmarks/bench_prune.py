"""Times the circuit part (read-in to read-out) of NACs: eager, and exported to ONNX.

    m2mkd prune runs/nac_fashion --mediators 0.05 --inputs 0.12 --finetune 2
    python benchmarks/bench_prune.py runs/nac_fashion runs/nac_fashion-pruned --threads 1

Every run is loaded from its checkpoint. `eager` is what `m2mkd prune` measures: PyTorch in eval
mode with the circuits found beforehand; what follows from codes and signatures alone is computed
in every call. `onnx` is the same part as `m2mkd export --target cpu` writes it, where all of that
is a constant, under ONNX Runtime. Every round takes every form in turn, as often as fits into
`--seconds`; a ratio is the median over rounds of the first run's time divided by a run's in the
same round and form, with its quartiles.
"""

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir
import onnxruntime
import torch
from timing import Clock, choose_clock, machine, measure
from torch import Tensor, nn

from m2mkd.export.nac_graph import fold, nac_translations, use_constant_graph, without_unheard
from m2mkd.export.onnx_ops import OPSET
from m2mkd.models import NAC
from m2mkd.models.checkpoint import load_model

Run = Callable[[], object]


class CircuitPart(nn.Module):
    """Tokens [B, V, D] to the states of the output latents, as constants allow."""

    def __init__(self, nac: NAC) -> None:
        super().__init__()
        self.nac = nac
        self.training = False  # eval() would let go of the circuits that the graph needs fixed

    def forward(self, tokens_BVD: Tensor) -> Tensor:
        """As `NAC.forward_circuit`."""
        return self.nac.forward_circuit(tokens_BVD)


def export_circuit(nac: NAC, tokens_BVD: Tensor, threads: int) -> onnxruntime.InferenceSession:
    """The circuit part of a NAC, exported for the CPU and opened."""
    smaller = without_unheard(nac)
    use_constant_graph(smaller)
    program = torch.onnx.export(
        CircuitPart(smaller),
        (tokens_BVD,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["tokens"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        custom_translation_table=nac_translations(OPSET),
        verbose=False,
    )
    assert program is not None
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "circuit.onnx"
        onnx_ir.save(fold(program.model), path)
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(path), settings, providers=providers)


def eager_run(nac: NAC, tokens_BVD: Tensor) -> Run:
    """One pass of the circuit part in eager mode."""

    @torch.inference_mode()
    def run() -> None:
        nac.forward_circuit(tokens_BVD)

    return run


def repeated(run: Run, seconds: float) -> tuple[Run, int]:
    """A loop over `run` that takes about so long, and how often it runs."""
    run()
    start = time.perf_counter()
    run()
    count = max(1, math.ceil(seconds / (time.perf_counter() - start)))

    def loop() -> None:
        for _ in range(count):
            run()

    return loop, count


def time_forms(
    forms: dict[str, Run], rounds: int, seconds: float, clock: Clock
) -> dict[str, dict[str, float]]:
    """Milliseconds of one pass by form, and how many times faster it is than the first form."""
    loops = {name: repeated(run, seconds) for name, run in forms.items()}
    base = next(iter(loops))
    counts = {name: count for name, (_, count) in loops.items()}
    measured = measure({name: loop for name, (loop, _) in loops.items()}, base, rounds, clock)
    times = {}
    for name, result in measured.items():
        share = counts[name] / counts[base]  # ratios are of whole loops
        times[name] = {
            "ms": result["ms"] / counts[name],
            "faster": share / result["ratio"],
            "faster_low": share / result["ratio_high"],
            "faster_high": share / result["ratio_low"],
        }
    return times


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first is the base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="per form and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    return parser.parse_args()


def main() -> None:
    """Prints text, or one JSON line."""
    options = parse()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    clock = choose_clock("cpu", options.clock)
    nacs: dict[str, NAC] = {}
    for folder in options.runs:
        model = load_model(folder)[0]
        assert isinstance(model, NAC), f"{folder} is no NAC"
        nacs[folder.name] = model.eval()
    with torch.inference_mode():
        image = torch.randn(1, *next(iter(nacs.values())).default_cfg["input_size"])
        tokens_1VD = next(iter(nacs.values())).tokenizer(image).clone()
    sessions = {
        name: export_circuit(nac, torch.randn(2, *tokens_1VD.shape[1:]), options.threads)
        for name, nac in nacs.items()
    }
    for nac in nacs.values():
        nac.fix_circuits()
    if not options.json:
        print(f"{machine('cpu')}, {options.threads} threads, {options.clock} clock")
    everything = {}
    for batch in options.batches:
        tokens_BVD = torch.randn(batch, *tokens_1VD.shape[1:])
        feed = {"tokens": tokens_BVD.numpy()}
        kinds: dict[str, dict[str, Run]] = {
            "eager": {name: eager_run(nac, tokens_BVD) for name, nac in nacs.items()},
            "onnx": {name: partial(session.run, None, feed) for name, session in sessions.items()},
        }
        for kind, forms in kinds.items():
            times = time_forms(forms, options.rounds, options.seconds, clock)
            everything[f"{kind}, batch {batch}"] = times
            if options.json:
                continue
            print(f"{kind}, batch {batch}")
            for name, t in times.items():
                spread = f"{t['faster_low']:.1f} to {t['faster_high']:.1f}"
                print(f"  {name:24} {t['ms']:9.3f} ms   {t['faster']:5.2f} times faster ({spread})")
    if options.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
