"""How accuracy and cost of a NAC fall with its latents and layers, and a smaller one's run."""

import copy
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m2mkd.distill import SupervisedTask
from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models.checkpoint import (
    Checkpoint,
    ModelCard,
    load_model,
    write_checkpoint,
    write_failure,
    write_text,
)
from m2mkd.models.nac import NAC
from m2mkd.models.nac_pruning import (
    keep_latents,
    keep_layers,
    latent_traffic,
    least_missed_layers,
    output_weights,
    pruned_args,
)
from m2mkd.recipe import DataConfig, Recipe, digest, load_recipe
from m2mkd.train.data import ImageData
from m2mkd.train.datasets import spread_over_classes
from m2mkd.train.evaluate import evaluate_model
from m2mkd.train.loop import Context, Job, fit
from m2mkd.train.progress import Reporter
from m2mkd.train.world import make_accelerator

_FRACTIONS = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32)
_BATCH = 64  # of the second latency
_ROUNDS = 3  # over all sizes, so that drift of the machine meets all alike
_SECONDS = 0.2  # of timing per size, batch and round


@dataclass(frozen=True)
class Point:
    """A NAC with some of its latents.

    Attributes:
        mediators: How many mediators.
        inputs: How many input latents.
        outputs: How many output latents.
        layers: How many propagators.
        top1: Accuracy on the validation images, per cent.
        loss: Mean cross-entropy there.
        circuit_flops: Floating-point operations from read-in to read-out for one image.
        flops: Those of the whole network.
        circuit_ms: Time from read-in to read-out for one image alone, in ms.
        circuit_ms_per_image: The same for each of a batch of 64.
    """

    mediators: int
    inputs: int
    outputs: int
    layers: int
    top1: float
    loss: float
    circuit_flops: int
    flops: int
    circuit_ms: float
    circuit_ms_per_image: float


def prune_run(
    source: Path,
    recipe_file: Path,
    data_config: DataConfig,
    out: Path,
    reporter: Reporter,
    *,
    mediators: float | None = None,
    budget: float | None = None,
    inputs: float = 1.0,
    outputs: float = 1.0,
    layers: float = 1.0,
    finetune: int = 0,
) -> dict[str, Any]:
    """Measures a NAC with fewer and fewer mediators and writes the chosen one as a run.

    Mediators and inputs go in the order of `latent_traffic`, least first; outputs in that of
    `output_weights`, and layers in that of `least_missed_layers`, on a batch of training images.
    `out` becomes a run folder that evaluate and export accept, with `pruning.json` and
    `pruning.png` in it.

    Args:
        source: A run, stage or step folder of a NAC.
        recipe_file: The run's recipe; fine-tuning needs a whole one, which imported runs lack.
        data_config: The data whose validation images grade the networks.
        out: A folder that does not exist.
        reporter: Where progress goes.
        mediators: Share of the mediators to keep, in (0, 1]; at least one stays.
        budget: Or: accuracy that may be lost, in points; the fewest mediators measured that lose
            no more are kept. The validation images decide, so those are no longer a fair test.
        inputs: Share of the input latents to keep, in (0, 1], in every smaller network.
        outputs: The same of the output latents.
        layers: The same of the propagators.
        finetune: Epochs of training afterwards, at a tenth of the end-to-end learning rate.

    Returns:
        What `pruning.json` holds.

    Raises:
        ConfigError: Not a NAC, neither or both of mediators and budget, values out of range, or
            fine-tuning without a whole recipe.
        CheckpointError: Nothing to prune, or `out` exists or cannot be written.
    """
    others = {"inputs": inputs, "outputs": outputs, "layers": layers}
    _check_wishes(mediators, budget, others, finetune)
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it or choose another folder with --out")
    model, checkpoint = _load_nac(source)
    recipe = load_recipe(str(recipe_file)) if finetune else None
    data = ImageData(data_config, recipe.seed if recipe else 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    smaller, kept_others = _prune_others(model, data, **others)
    traffic_M = latent_traffic(keep_layers(model, kept_others["layers"]))[1]
    order_M = traffic_M.argsort(descending=True)
    total = len(order_M)
    wished = None if mediators is None else max(1, round(mediators * total))
    curve = measure_curve(model, smaller, order_M, data, reporter, also=wished)
    chosen = choose(curve, wished, budget)
    kept = sorted(order_M[: chosen.mediators].tolist())
    pruned = keep_latents(smaller, mediators=kept)
    card = _pruned_card(checkpoint.card, pruned)
    result: dict[str, Any] = {
        "source": str(source),
        "mediators": chosen.mediators,
        "of": total,
        "kept": kept,
        **{f"kept_{kind}": numbers for kind, numbers in kept_others.items()},
        **_measured(curve, chosen, device),
    }
    key = digest(checkpoint.meta["sha256"], kept, kept_others, finetune)
    _write_recipe(out, recipe_file, data_config, card)
    if recipe is not None:
        result["finetuned"] = _finetune(pruned, card, recipe, data, out, key, finetune, reporter)
    else:
        _store(pruned, card, out, key)
    _copy_samples(source, out)
    write_text(out / "pruning.json", json.dumps(result, indent=1))
    plot_curve(result, out / "pruning.png")
    return result


def _measured(curve: list[Point], chosen: Point, device: torch.device) -> dict[str, Any]:
    """The part of `pruning.json` that was measured, and on what."""
    return {
        "full": asdict(curve[0]),
        "pruned": asdict(chosen),
        "finetuned": None,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "curve": [asdict(point) for point in curve],
    }


def _pruned_card(card: ModelCard, pruned: NAC) -> ModelCard:
    """What the checkpoint says of the network, with its new sizes."""
    model_args = {**card.model_args, **pruned_args(pruned)}
    return replace(card, model_args=model_args, depths=[1] * (pruned.depth + 2))


def measure_curve(
    full: NAC,
    smaller: NAC,
    order_M: Tensor,
    data: ImageData,
    reporter: Reporter,
    also: int | None = None,
) -> list[Point]:
    """Grades and times a NAC with the first mediators of an order, from all to few.

    Args:
        full: In eval mode, on the device to measure on; the first point.
        smaller: The one to take mediators from.
        order_M: Its mediators, most important first, [M].
        data: Its validation images grade the networks.
        reporter: Where progress goes.
        also: A number of mediators that has to be among those measured.
    """
    total = len(order_M)
    counts = {max(1, round(share * total)) for share in _FRACTIONS} | ({also} if also else set())
    if pruned_args(smaller) == pruned_args(full):
        counts -= {total}
    models = [keep_latents(full)] + [
        keep_latents(smaller, mediators=order_M[:count]) for count in sorted(counts, reverse=True)
    ]
    times = {batch: _circuit_ms(models, batch, data) for batch in (1, _BATCH)}
    points = []
    for i, model in enumerate(models):
        grade = evaluate_model(model, data.validation_batches(), order_M.device)
        circuit_flops, flops = count_flops(model, _images(data, 1, order_M.device))
        point = Point(
            mediators=model.options.num_mediators,
            inputs=model.options.num_inputs,
            outputs=model.options.num_outputs,
            layers=model.depth,
            top1=round(grade.top1, 3),
            loss=round(grade.loss, 5),
            circuit_flops=circuit_flops,
            flops=flops,
            circuit_ms=round(times[1][i], 4),
            circuit_ms_per_image=round(times[_BATCH][i] / _BATCH, 4),
        )
        points.append(point)
        reporter.message(
            f"{point.mediators:>5} mediators, {point.inputs} inputs, {point.outputs} outputs, "
            f"{point.layers} layers: top-1 {point.top1:.2f} %, circuit {point.circuit_ms:.2f} ms "
            f"alone, {point.circuit_ms_per_image:.3f} ms in a batch"
        )
    return points


def choose(curve: Sequence[Point], wished: int | None, budget: float | None) -> Point:
    """The point with the wished number of mediators, or the cheapest that keeps to the budget."""
    if wished is not None:
        return next(point for point in reversed(curve) if point.mediators == wished)
    assert budget is not None
    # Accuracies have three decimals; a sum of two must not miss its mark by rounding.
    least = curve[0].top1 - budget - 1e-6
    return min((p for p in curve if p.top1 >= least), key=lambda p: p.circuit_flops)


@torch.no_grad()
def count_flops(model: NAC, images: Tensor) -> tuple[int, int]:
    """Floating-point operations of the circuit (read-in to read-out) and of the whole network.

    Matrix products, convolutions and attention along edges are counted, two for each multiply-add.
    """
    # Its attention has no matrix product, so that no operation counts twice.
    model = copy.deepcopy(model).requires_grad_(False)
    model.set_attention_impl("reference")
    model.fix_circuits()  # the search for edges happens once, not per image
    with FlopCounterMode(display=False) as counter:
        tokens = model.tokenizer(images)
    before = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        states = model.forward_circuit(tokens)
    circuit = counter.get_total_flops()
    inner = model.options.num_heads * model.options.head_dim
    edges = sum(model.circuit(layer).num_edges for layer in range(model.depth + 1))
    circuit += 4 * inner * edges * images.shape[0]
    with FlopCounterMode(display=False) as counter:
        model.forward_head(states)
    return circuit, before + circuit + counter.get_total_flops()


def plot_curve(result: dict[str, Any], path: Path) -> None:
    """Draws accuracy against mediators, latency and operations of the circuit.

    Args:
        result: As `prune_run` returns it.
        path: File to write.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    full, pruned, tuned = result["full"], result["pruned"], result["finetuned"]
    figure.suptitle(
        f"{result['mediators']} of {result['of']} mediators kept: top-1 {pruned['top1']:.2f} % "
        f"(full {full['top1']:.2f} %), circuit on {result['device']}, threads: {result['threads']}"
    )
    panels = {
        "mediators": ("mediators", "mediators", 1.0),
        "circuit_ms": ("one image", "ms, read-in to read-out", 1.0),
        "circuit_ms_per_image": (f"batch of {_BATCH}", "ms per image, read-in to read-out", 1.0),
        "circuit_flops": ("operations", "MFLOP per image, read-in to read-out", 1e-6),
    }
    axes_row = figure.subplots(1, len(panels), sharey=True)
    for axes, (key, (title, label, unit)) in zip(axes_row, panels.items(), strict=True):
        points = [(point[key] * unit, point["top1"]) for point in result["curve"]]
        axes.plot(*zip(*points, strict=True), marker="o", color="#1f4e79", label="pruned")
        here = pruned[key] * unit
        axes.plot(here, pruned["top1"], "o", ms=11, mfc="none", color="#d95f02", label="chosen")
        if tuned is not None:
            axes.plot(here, tuned["top1"], "*", ms=12, color="#d95f02", label="fine-tuned")
        axes.axhline(full["top1"], color="grey", linestyle="--", linewidth=0.8)
        axes.set(title=title, xlabel=label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    axes_row[0].set_ylabel("top-1 accuracy, %")
    axes_row[0].legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise write_failure(path, error) from error


def _load_nac(source: Path) -> tuple[NAC, Checkpoint]:
    model, checkpoint = load_model(source)
    if not isinstance(model, NAC):
        raise ConfigError(
            f"{source} is a {type(model).__name__}; only a NAC has mediators to prune"
        )
    return model, checkpoint


def _check_wishes(
    mediators: float | None, budget: float | None, others: Mapping[str, float], finetune: int
) -> None:
    if (mediators is None) == (budget is None):
        raise ConfigError("prune: give either a share of mediators to keep, or a budget")
    if mediators is not None and not 0 < mediators <= 1:
        raise ConfigError(f"prune: mediators={mediators} is no share in (0, 1], such as 0.25")
    if budget is not None and not 0 <= budget <= 100:
        raise ConfigError(f"prune: budget={budget} is not in 0 to 100 points of accuracy")
    for kind, share in others.items():
        if not 0 < share <= 1:
            raise ConfigError(f"prune: {kind}={share} is no share in (0, 1], such as 0.5")
    if finetune < 0:
        raise ConfigError(f"prune: finetune={finetune} epochs; it cannot be negative")


def _first(order: Tensor, share: float) -> list[int]:
    """The first so many of an order, at least one, sorted."""
    return sorted(order[: max(1, round(share * len(order)))].tolist())


def _prune_others(
    model: NAC, data: ImageData, *, inputs: float, outputs: float, layers: float
) -> tuple[NAC, dict[str, list[int]]]:
    """A NAC with the wished shares of all but mediators, and the numbers of what it has kept."""
    spread = spread_over_classes(data.train.labels).tolist()
    images, labels_B = next(iter(data.plain_batches(data.train, spread)))
    device = model.output_latents.codes.device
    images, labels_B = images.to(device), labels_B.to(device)
    num_layers = max(1, round(layers * model.depth))
    kept_layers = least_missed_layers(model, images, labels_B, num_layers)
    smaller = keep_layers(model, kept_layers)
    order_I = latent_traffic(smaller)[0].argsort(descending=True)
    order_O = output_weights(smaller, images).argsort(descending=True)
    kept = {"inputs": _first(order_I, inputs), "outputs": _first(order_O, outputs)}
    return keep_latents(smaller, **kept), {**kept, "layers": kept_layers}


def _circuit_ms(models: Sequence[NAC], batch: int, data: ImageData) -> list[float]:
    """Median time of each network from read-in to read-out; the least of some rounds."""
    best = [float("inf")] * len(models)
    device = models[0].mediator_latents.signatures.device
    with torch.inference_mode():
        tokens = models[0].tokenizer(_images(data, batch, device))
        for model in models:
            model.fix_circuits()  # in use, signatures stay as they are
        for _ in range(_ROUNDS):
            for i, model in enumerate(models):
                best[i] = min(best[i], _median_ms(model, tokens))
    return best


def _median_ms(model: NAC, tokens: Tensor) -> float:
    """Median over the runs that fit into the time, after one that does not count."""
    times: list[float] = []
    end = float("inf")
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        model.forward_circuit(tokens)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        if len(times) == 1:
            end = time.perf_counter() + _SECONDS
    return statistics.median(times[1:])


def _images(data: ImageData, count: int, device: torch.device) -> Tensor:
    """Some validation images, over again where there are fewer."""
    images, _ = next(iter(data.validation_batches()))
    repeats = -(-count // images.shape[0])
    return images.repeat(repeats, 1, 1, 1)[:count].to(device)


def _write_recipe(out: Path, recipe_file: Path, data: DataConfig, card: ModelCard) -> None:
    """The recipe with the smaller student, for evaluate and export; it was not trained by it."""
    values = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    values.pop("end_to_end_data", None)  # this is what `data` is from now on
    for choice in ("grid", "classifier"):  # of what to do where the two differ
        values.get("distill", {}).pop(choice, None)
    values |= {"name": out.name, "data": data.model_dump(mode="json")}
    values["student"].pop("depths", None)  # a NAC's follow from its layers
    values["student"] |= {"model": card.model, "model_args": card.model_args}
    text = yaml.safe_dump(values, sort_keys=False)
    write_text(out / "recipe.yaml", f"# pruned by m2mkd; pruning.json says from what\n{text}")


def _store(model: NAC, card: ModelCard, out: Path, key: str) -> None:
    stage = out / "end_to_end"
    meta = {"card": asdict(card), "stage": "end_to_end", "digest": key}
    write_checkpoint(stage, 0, model.state_dict(), meta=meta)
    write_text(stage / "DONE", json.dumps({"digest": key, "steps": 0}, indent=1))


def _finetune(
    model: NAC,
    card: ModelCard,
    recipe: Recipe,
    data: ImageData,
    out: Path,
    key: str,
    epochs: int,
    reporter: Reporter,
) -> dict[str, float]:
    """Trains the pruned network and leaves it in the run's last stage."""
    schedule = recipe.end_to_end.model_copy(
        update={"epochs": epochs, "lr": recipe.end_to_end.lr / 10, "warmup_epochs": 0}
    )
    accelerator = make_accelerator(recipe)
    job = Job(
        name="fine-tuning",
        stage="end_to_end",
        task=SupervisedTask(model),
        schedule=schedule,
        folder=out / "end_to_end",
        digest=key,
        meta={"card": asdict(card)},
        setting="end_to_end",
    )
    context = Context(
        accelerator=accelerator,
        data=data,
        augment=recipe.data_of("end_to_end").augment,
        seed=recipe.seed,
        reporter=reporter,
    )
    fit(job, context)
    grade = evaluate_model(model, data.validation_batches(), accelerator.device)
    return {"epochs": epochs, "top1": round(grade.top1, 3), "loss": round(grade.loss, 5)}


def _copy_samples(source: Path, out: Path) -> None:
    """Held-out images of the run, with which exported files are verified."""
    folder = source / "samples"
    if not folder.is_dir():
        return
    try:
        shutil.copytree(folder, out / "samples")
    except OSError as error:
        raise write_failure(out / "samples", error) from error
