"""The evaluate stage: what a run reached, in `summary.json`, `report.html` and sample images."""

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from m2mkd.models import NAC, split_vit
from m2mkd.models.checkpoint import read_json, write_failure, write_text
from m2mkd.train.alignment import grade_hybrids, hosting_meta, hybrids_before
from m2mkd.train.circuit_pictures import plot_circuit, plot_circuit_history
from m2mkd.train.loop import read_metrics
from m2mkd.train.report import corrupt_run, grade_run, write_report

if TYPE_CHECKING:
    from m2mkd.train.run import Run

_SAMPLES = 10  # held-out images written for `m2mkd predict`


def summarise(run: "Run") -> dict[str, Any]:
    """Grades every network of a complete run on the held-out images and writes the results.

    Students are graded on the data that they are trained on end to end, all others on the pairs'.

    Returns:
        What `summary.json` holds: top-1 accuracies in per cent (`hybrids` are the meta model with
        one module of the teacher or the student in it; `meta` is the one that the pairs had), and
        the gains over the baselines. `pairs_data` says what meta model, teacher and hybrids were
        graded on, where students were graded on other data.
    """
    data = run.data_of("end_to_end")
    bad_images = sum(images.bad_images for images in {run.data, data})
    accuracy: dict[str, Any] = {
        "meta": round(run.evaluate(hosting_meta(run), run.data).top1, 3),
        "teacher": _top1(run, "teacher"),
        "teacher_hybrids": _hybrids(run, list(_teacher_modules(run))),
        "student_hybrids": _hybrids(run, run.pair_modules()),
        "assembled": read_json(run.out / "end_to_end" / "assembly.json")["accuracy"]["top1"],
        "m2mkd": _top1(run, "end_to_end"),
    }
    if (before := hybrids_before(run)) is not None:
        accuracy["hybrids_unaligned"] = before
    for name in run.recipe.baselines:
        accuracy[name] = _top1(run, f"baselines/{name}")
    schedule = run.recipe.distill.schedule
    summary = {
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "validation_images": len(data.validation),
        "pairs_data": _pairs_data(run),
        "unreadable_images": bad_images,
        "epochs": {"distill": schedule.epochs, "end_to_end": run.recipe.end_to_end.epochs},
        "parameters": run.networks.parameters,
        "assembly": run.recipe.distill.assembly,
        "accuracy": accuracy,
        "gain": {
            name: round(accuracy["m2mkd"] - accuracy[name], 3) for name in run.recipe.baselines
        },
        "seconds": {name: _seconds(run, name) for name in run.plan},
    }
    if bad_images:
        run.reporter.message(f"{bad_images} unreadable images were left out")
    write_text(run.out / "summary.json", json.dumps(summary, indent=1))
    _write_samples(run)
    _draw_circuits(run)
    grade_run(run.out, data, run.device)
    if run.recipe.corruptions:
        corrupt_run(run.out, data, run.device, run.reporter)
    write_report([run.out], run.out / "report.html")
    return summary


def _pairs_data(run: "Run") -> dict[str, Any] | None:
    if run.recipe.end_to_end_data is None:
        return None
    images = len(run.data.validation)
    return {"dataset": run.recipe.data.dataset, "validation_images": images}


def _draw_circuits(run: "Run") -> None:
    """A NAC's circuit as it was learned, and how it became so."""
    student = run.load("end_to_end")
    if not isinstance(student, NAC):
        return
    folder = run.out / "end_to_end"
    plot_circuit(student.circuit(0), folder / "circuit.png", f"{run.recipe.name}: learned circuit")
    plot_circuit_history(read_metrics(folder), folder / "circuit-history.png")


def _top1(run: "Run", name: str) -> float:
    return round(run.evaluate(run.load(name), run.data_of(name)).top1, 3)


def _teacher_modules(run: "Run") -> nn.ModuleList:
    return split_vit(run.load("teacher"), run.networks.teacher_depths)


def _hybrids(run: "Run", modules: list[nn.Module]) -> list[float]:
    meta = list(split_vit(hosting_meta(run), [1] * run.networks.num_modules))
    return grade_hybrids(meta, modules, lambda hybrid: run.evaluate(hybrid, run.data))


def _seconds(run: "Run", name: str) -> float:
    """Training time of a stage over all sittings."""
    folder = run.out / name
    is_joint = (folder / "joint" / "DONE").is_file()
    parts = [folder / "joint"] if is_joint else sorted(folder.glob("pair-*")) or [folder]
    seconds = [float(read_json(part / "DONE").get("seconds", 0.0)) for part in parts]
    return round(sum(seconds), 1)


def _write_samples(run: "Run") -> None:
    """Held-out images as files named `INDEX_CLASS.png`, to try `m2mkd predict` on."""
    folder = run.out / "samples"
    samples = run.data_of("end_to_end").sample_images(_SAMPLES)
    try:
        folder.mkdir(exist_ok=True)
        for index, class_name, image in samples:
            safe = "".join(c if c.isalnum() else "-" for c in class_name[:60])
            image.save(folder / f"{index:05d}_{safe}.png")
    except OSError as error:
        raise write_failure(folder, error) from error
