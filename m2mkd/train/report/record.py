"""What a run folder tells: recipe, results, and the curve of every stage, finished or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models.checkpoint import read_json
from m2mkd.recipe import Recipe, load_recipe
from m2mkd.train.loop import read_metrics
from m2mkd.train.report.grades import read_corruptions, read_grades

_MOST_POINTS = 200  # of a curve; longer ones are averaged
# What may differ between runs that are shown as seeds of one recipe: it does not change results.
_MAY_DIFFER = {"name", "seed", "threads", "checkpoint_every", "tracking", "corruptions"}
_DATA_MAY_DIFFER = {"root", "workers", "eval_batch_size"}


@dataclass
class Curve:
    """One quantity against optimiser steps."""

    steps: list[float]
    values: list[float]


@dataclass
class Stage:
    """One trained unit: a stage, or one pair.

    Attributes:
        name: Folder inside the run.
        loss: Training loss by step.
        top1: Validation accuracy in per cent, by epoch.
        epochs: Passes over the training images its schedule asks for.
        done: Content of its `DONE` file; empty while it is not complete. Pairs that were trained
            together have the time of all of them in `joint_done` of the record.
    """

    name: str
    loss: Curve
    top1: Curve
    epochs: int
    done: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """A run as its folder tells it."""

    path: Path
    recipe: Recipe
    resolved_by: str
    recipe_text: str
    stages: dict[str, Stage]
    summary: dict[str, Any] | None
    grades: dict[str, Any] | None
    corruptions: dict[str, Any] | None
    joint_done: dict[str, Any]

    @property
    def pairs(self) -> list[Stage]:
        """The module pairs, in order."""
        return [stage for name, stage in self.stages.items() if name.startswith("distill/pair")]


def read_run(path: Path) -> Record:
    """Reads a run folder.

    Raises:
        CheckpointError: It is no run folder, or a file in it is damaged.
    """
    file = path / "recipe.yaml"
    if not file.is_file():
        raise CheckpointError(f"{path} is no run folder: it has no recipe.yaml")
    recipe = load_recipe(str(file))
    text = file.read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    is_comment = first.startswith("#")
    return Record(
        path=path,
        recipe=recipe,
        resolved_by=first.removeprefix("# resolved by ") if is_comment else "",
        recipe_text=rest if is_comment else text,
        stages=_stages(path, recipe),
        summary=read_json(path / "summary.json") if (path / "summary.json").is_file() else None,
        grades=read_grades(path),
        corruptions=read_corruptions(path),
        joint_done=_done(path / "distill" / "joint"),
    )


def check_same_recipe(records: list[Record]) -> None:
    """Lets runs be shown together only when they differ in nothing but their seed.

    Raises:
        ConfigError: They differ otherwise; the message names the keys.
    """
    first = _settings(records[0])
    for record in records[1:]:
        other = _settings(record)
        keys = sorted(
            key for key in first.keys() | other.keys() if first.get(key) != other.get(key)
        )
        if keys:
            raise ConfigError(
                f"{records[0].path} and {record.path} are not seeds of one recipe: they differ in "
                f"{', '.join(keys[:5])}; report them one by one"
            )


def _settings(record: Record) -> dict[str, Any]:
    values = record.recipe.model_dump(mode="json", exclude=_MAY_DIFFER)
    for section in ("data", "end_to_end_data"):
        for key, value in (values.pop(section) or {}).items():
            if key not in _DATA_MAY_DIFFER:
                values[f"{section}.{key}"] = value
    return values


def _stages(path: Path, recipe: Recipe) -> dict[str, Stage]:
    longer = recipe.end_to_end.epochs + recipe.distill.schedule.epochs
    schedules = {
        "meta": recipe.meta.epochs,
        "incubation": recipe.teacher.incubate.epochs if recipe.teacher.incubate else 0,
        "teacher": recipe.teacher.finetune.epochs if recipe.teacher.finetune else 0,
        "alignment": recipe.meta.epochs,
        **{f"distill/{f.name}": recipe.distill.schedule.epochs for f in _pair_folders(path)},
        "end_to_end": recipe.end_to_end.epochs,
        **{
            f"baselines/{name}": longer if name == "equal_updates" else recipe.end_to_end.epochs
            for name in recipe.baselines
        },
    }
    stages = {}
    for name, epochs in schedules.items():
        folder = path / name
        lines = read_metrics(folder)
        done = _done(folder)
        if lines or done:
            stages[name] = Stage(name, *_curves(lines), epochs, done)
    return stages


def _done(folder: Path) -> dict[str, Any]:
    return read_json(folder / "DONE") if (folder / "DONE").is_file() else {}


def _pair_folders(path: Path) -> list[Path]:
    return sorted(folder for folder in (path / "distill").glob("pair-*") if folder.is_dir())


def _curves(lines: list[dict[str, Any]]) -> tuple[Curve, Curve]:
    losses = [(float(x["step"]), float(x["loss"])) for x in lines if "loss" in x]
    graded = [x for x in lines if "top1" in x.get("validation", {})]
    points = [(float(x["epoch"] + 1), float(x["validation"]["top1"])) for x in graded]
    return _curve(_thinned(losses)), _curve(points)


def _curve(points: list[tuple[float, float]]) -> Curve:
    return Curve([x for x, _ in points], [y for _, y in points])


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that a long run's curve has at most `_MOST_POINTS` points."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
