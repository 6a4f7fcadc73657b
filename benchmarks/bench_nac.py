"""Times a NAC, and measures its memory, against the literal form of the published code.

    python benchmarks/bench_nac.py --threads 2
    python benchmarks/bench_nac.py --threads 1 --clock cpu --rounds 3 --part time
    python benchmarks/bench_nac.py --part memory --model nac_imagenet --batch 2 --forms m2mkd
    python benchmarks/bench_nac.py --part onnx --threads 2

float32, the scale-free prior of the papers, the same weights in all forms. `literal` is
`literal_nac.py`, which the tests hold to the published logits in evaluation and in training;
`checkpointed` is `m2mkd` with gradient checkpointing, as the paper's recipes train.

Parts:
    time    forward in eval mode, and forward with backward in training mode with the published
            noise on links, codes, first states, paths and confidences. Every round runs every form
            once; a ratio is the median over rounds of a form's time divided by
            that of `m2mkd` in the same round. `floor` is a loop over one large matrix product until
            it has done as many operations as the matrix products and convolutions of `m2mkd`: no
            form with that arithmetic can be faster.
    memory  peak of the resident memory of a forward and backward pass in training mode, gradients
            of all parameters included, above what the process held before it; each form in a
            process of its own, after a pass with one example that loads all libraries. Once with
            every block of memory given back to the system when it is freed, which is what the pass
            needs, and once as malloc does it, which keeps holes between blocks.
    onnx    latency of the exported file (target cpu) under ONNX Runtime, batch 1, against this
            package's model in eval mode.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from literal_nac import PUBLISHED, Literal, published_config
from timing import Clock, choose_clock, machine, measure, reset_resident_peak, resident_peak
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m2mkd.export.exporter import export_model
from m2mkd.export.session import INPUT
from m2mkd.models import NAC, official
from m2mkd.models.checkpoint import ModelCard
from m2mkd.nn.graphs import prior_signatures

FORMS = ("m2mkd", "checkpointed", "literal")
# In glibc: blocks from this size on are given back at once, whatever sizes were freed before.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
IMAGE_SIZES = {"nac_tiny_imagenet": 64, "nac_imagenet": 224}
# Rows, inputs and outputs of the product that measures the floor: the first layer of an FFN.
FLOOR = (2048, 384, 1536)


def make_literal(name: str) -> Literal:
    """The literal form with drawn weights, and signatures fitted to the prior."""
    torch.manual_seed(0)
    config = published_config(name)
    options = config["latent_graph_kwargs"]
    generator = options["mediator_latent_kwargs"]["graph_generator_kwargs"]
    literal = Literal(config)
    literal.state["latent_graphs.0.mediator_latents.signatures_"] = prior_signatures(
        "barabasi_albert", generator["n"], options["signature_dim"], seed=0, m=generator["m"]
    )
    with torch.no_grad():
        literal.logits(images_for(name, 1))  # draws the other weights
    literal.draws = False
    return literal


def make_ours(literal: Literal) -> NAC:
    """Our NAC with the same weights."""
    nac = official.load("nac", literal.state, literal.config)
    assert isinstance(nac, NAC)
    return nac


def images_for(name: str, batch: int) -> Tensor:
    """Normal pixels."""
    size = IMAGE_SIZES[name]
    return torch.randn(batch, 3, size, size)


class Form(NamedTuple):
    """One of the forms.

    Attributes:
        logits: Of images.
        train: Sets training or eval mode.
        weights: All of them, which want gradients.
    """

    logits: Callable[[Tensor], Tensor]
    train: Callable[[bool], object]
    weights: list[Tensor]


def make_form(name: str, kind: str) -> Form:
    """A model in one form."""
    literal = make_literal(name)
    if kind == "literal":
        weights = [tensor.requires_grad_() for tensor in literal.state.values()]
        return Form(literal.logits, partial(setattr, literal, "training"), weights)
    ours = make_ours(literal)
    ours.set_grad_checkpointing(kind == "checkpointed")
    return Form(ours, ours.train, list(ours.parameters()))


def forward(form: Form, images: Tensor) -> None:
    """Logits in eval mode."""
    form.train(False)
    form.logits(images)


def both(form: Form, images: Tensor) -> None:
    """Gradients of all weights in training mode."""
    form.train(True)
    form.logits(images).square().mean().backward()
    for weight in form.weights:
        weight.grad = None


def make_floor(run: Callable[[], None]) -> tuple[Callable[[], None], float]:
    """A loop of products with the operations of `run`, and their number."""
    with FlopCounterMode(display=False) as counter:
        run()
    operations = counter.get_total_flops()
    rows, inputs, outputs = FLOOR
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    out = torch.empty(rows, outputs)
    repeats = round(operations / (2 * math.prod(FLOOR)))

    def loop() -> None:
        for _ in range(repeats):
            torch.mm(x, weight.T, out=out)

    return loop, operations


def time_forms(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Every form in both directions, with the floor."""
    everything: dict[str, Any] = {}
    images = images_for(options.model, options.batch)
    forms = {kind: make_form(options.model, kind) for kind in options.forms}
    for direction, run in (("forward", forward), ("forward+backward", both)):
        floor, operations = make_floor(partial(run, forms["m2mkd"], images))
        runs = {kind: partial(run, form, images) for kind, form in forms.items()}
        with torch.set_grad_enabled(run is both):
            results = measure({**runs, "floor": floor}, "m2mkd", options.rounds, clock)
        everything[direction] = {**results, "gflop": operations / 1e9}
        if not options.json:
            print(f"{options.model}, batch {options.batch}, {direction}")
            for name, r in results.items():
                spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
                print(f"  {name:12} {r['ms']:9.1f} ms   {r['ratio']:5.2f} ({spread})")
            print(f"  {operations / 1e9:.1f} GFLOP in products and convolutions of m2mkd")
    return everything


def step_memory(name: str, form: str, batch: int) -> float:
    """MiB that a forward and backward pass needs above what was there before it."""
    model, images = make_form(name, form), images_for(name, batch)
    both(model, images[:1])
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_resident_peak()
    both(model, images)
    return resident_peak() - before


def memory_of_forms(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Peak memory of a step, each form in a fresh process."""
    del clock
    everything: dict[str, Any] = {}
    for form in options.forms:
        command = [sys.executable, __file__, "--child", "--forms", form]
        for option in ("model", "batch", "threads"):
            command += [f"--{option}", str(getattr(options, option))]
        needed, held = (
            float(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
            for env in ({**os.environ, **GIVE_BACK}, None)
        )
        everything[form] = {"needed": needed, "held": held}
        if not options.json:
            print(
                f"{options.model}, batch {options.batch}, {form:12} needs {needed:6.0f} MiB above "
                f"the model, holds {held:6.0f} MiB"
            )
    return everything


def time_onnx(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The exported file under ONNX Runtime against the model, batch 1."""
    import onnxruntime

    nac, size = make_ours(make_literal(options.model)), IMAGE_SIZES[options.model]
    classes = [str(index) for index in range(nac.num_classes)]
    preprocessing = {
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    card = ModelCard(options.model, {}, [], len(classes), size, 3, classes, preprocessing)
    images = images_for(options.model, 1)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_model(nac, card, Path(folder) / "nac.onnx", target="cpu")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(exported.path), settings, providers=providers)

    @torch.inference_mode()
    def eager() -> None:
        nac(images)

    forms = {"m2mkd": eager, "onnx": lambda: session.run(None, {INPUT: images.numpy()})}
    results = measure(forms, "m2mkd", options.rounds, clock)
    if not options.json:
        for name, r in results.items():
            spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
            print(f"batch 1, {name:6} {r['ms']:8.1f} ms   {r['ratio']:5.2f} ({spread})")
    return results


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["all", "time", "memory", "onnx"], default="all")
    parser.add_argument("--model", choices=list(PUBLISHED), default="nac_tiny_imagenet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prints text, or one JSON line."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(step_memory(options.model, options.forms[0], options.batch))
        return
    clock = choose_clock("cpu", options.clock)
    if not options.json:
        print(f"{machine('cpu')}, {options.threads} threads, {options.clock} clock")
    parts = {"time": time_forms, "memory": memory_of_forms, "onnx": time_onnx}
    chosen = list(parts) if options.part == "all" else [options.part]
    everything = {part: parts[part](options, clock) for part in chosen}
    if options.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
