"""Puts a run, or several seeds of one recipe, on one HTML page."""

import base64
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from scipy import stats

from m2mkd.models.checkpoint import write_text
from m2mkd.train.report import figures
from m2mkd.train.report.figures import SERIES
from m2mkd.train.report.grades import HISTORY
from m2mkd.train.report.record import Curve, Record, Stage, check_same_recipe, read_run

NAMES = {
    "m2mkd": "m2mKD",
    "end_to_end_only": "end to end only",
    "equal_updates": "end to end, equal updates",
    "logit_kd": "logit KD",
    "teacher": "teacher",
    "meta": "meta model",
    "assembled": "m2mKD, right after assembly",
}
HYBRIDS = {
    "hybrids_unaligned": "teacher module, before the alignment",
    "teacher_hybrids": "teacher module",
    "student_hybrids": "student module",
}
_COLORS = {
    "m2mkd": SERIES[0],
    "end_to_end_only": SERIES[1],
    "equal_updates": SERIES[2],
    "logit_kd": SERIES[3],
    "teacher": SERIES[4],
    "meta": SERIES[5],
}
_MOST_CLASSES = 40  # in a confusion matrix that can be read


@dataclass
class Gain:
    """What m2mKD gained over one baseline, in points of top-1 accuracy."""

    name: str
    mean: float
    by_seed: list[float]
    interval: tuple[float, float] | None  # 95 %, Student's t over seeds; None for one seed


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the report of a run, or of several runs that differ in their seed alone.

    The page is one file of HTML with inline pictures; it loads nothing. What a run has not
    computed yet is left out.

    Args:
        runs: Run folders, at least one.
        out: The file to write.

    Raises:
        CheckpointError: A folder is no run, a file in it is damaged, or `out` cannot be written.
        ConfigError: The runs are not seeds of one recipe.
    """
    records = [read_run(run) for run in runs]
    check_same_recipe(records)
    text = resources.files("m2mkd.train.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "points": points}
    page = environment.from_string(text).render(_context(records))
    write_text(out, page)
    return out


def duration(seconds: float) -> str:
    """Writes a time for people: `8.2 s`, `3 min 20 s`, `42 min`, `5 h 12 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def points(value: float, digits: int) -> str:
    """Writes a difference with its sign, such as `+1.2` or `-0.9` with a minus sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def gains(summaries: Sequence[dict[str, Any]]) -> list[Gain]:
    """What m2mKD gained over each baseline that every run has, seed by seed.

    The interval is Student's t over the seeds' differences: m2mKD and baseline of a seed start
    from the same weights and see the same data, so they are paired.
    """
    found = []
    for name in summaries[0]["gain"]:
        values = [summary["gain"][name] for summary in summaries if name in summary["gain"]]
        if len(values) == len(summaries):
            found.append(Gain(name, statistics.fmean(values), values, t_interval(values)))
    return found


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def chance_range(percent: float, images: int) -> float:
    """Half of the 95 % range of an accuracy that is due to which images were drawn, in points."""
    share = min(max(percent / 100.0, 0.0), 1.0)
    return 196.0 * math.sqrt(share * (1.0 - share) / max(1, images))


def _context(records: list[Record]) -> dict[str, Any]:
    first = records[0]
    complete = [record for record in records if record.summary is not None]
    summaries = [record.summary for record in complete if record.summary is not None]
    recipe = first.recipe
    return {
        "title": recipe.name,
        "runs": [str(record.path) for record in records],
        "seeds": [record.recipe.seed for record in records],
        "incomplete": [str(record.path) for record in records if record.summary is None],
        "recipe": recipe,
        "recipe_text": first.recipe_text,
        "resolved_by": sorted({record.resolved_by for record in records}),
        "names": NAMES,
        "results": _results(summaries) if summaries else None,
        "curves": _curves(records),
        "grades": _grades(records),
        "circuits": _circuits(first),
        "corruptions": _corruptions(first),
        "cost": _cost(first),
    }


def _results(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [summary["accuracy"] for summary in summaries]
    images = summaries[0]["validation_images"]
    other = summaries[0].get("pairs_data")  # earlier runs had no other
    rows = []
    for name in ("m2mkd", *summaries[0]["gain"], "assembled", "teacher", "meta"):
        values = [a[name] for a in accuracies if name in a]
        mean = statistics.fmean(values)
        there = other if name in ("teacher", "meta") else None
        rows.append(
            {
                "key": name,
                "name": NAMES[name] + (f", on {there['dataset']}" if there else ""),
                "mean": mean,
                "low": min(values),
                "high": max(values),
                "values": values,
                "half": chance_range(mean, there["validation_images"] if there else images),
            }
        )
    by_key = {row["key"]: row for row in rows}
    dots = [
        (row["name"], _COLORS[row["key"]], row["values"], row["half"])
        for row in rows
        if row["key"] in _COLORS
    ]
    levels = {"meta model": by_key["meta"]["mean"], "teacher": by_key["teacher"]["mean"]}
    return {
        "rows": rows,
        "by_key": by_key,
        "gains": gains(summaries),
        "images": images,
        "pairs_data": other,
        "num_seeds": len(summaries),
        "unreadable": summaries[0]["unreadable_images"],
        "epochs": summaries[0]["epochs"],
        "parameters": summaries[0]["parameters"],
        "seconds": statistics.fmean(sum(s["seconds"].values()) for s in summaries),
        "dots": figures.accuracy_dots(dots),
        "hybrids": figures.hybrids(
            [a["teacher_hybrids"] for a in accuracies],
            [a["student_hybrids"] for a in accuracies],
            levels,
        ),
        "hybrid_rows": [
            (
                kind,
                [
                    statistics.fmean(column)
                    for column in zip(*(a[key] for a in accuracies), strict=True)
                ],
            )
            for key, kind in HYBRIDS.items()
            if all(key in a for a in accuracies)
        ],
    }


def _curves(records: list[Record]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for record in records for name in record.stages))
    by_name = {n: [r.stages[n] for r in records if n in r.stages] for n in names}
    students = [
        (NAMES[key], _COLORS[key], _top1(by_name[name]))
        for name, key in _student_stages(by_name)
        if any(curve.steps for curve in _top1(by_name[name]))
    ]
    others = [
        (title, color, _top1(by_name[name]))
        for name, title, color in (
            ("meta", NAMES["meta"], _COLORS["meta"]),
            ("alignment", "meta model, learning from the teacher", SERIES[2]),
            ("teacher", NAMES["teacher"], _COLORS["teacher"]),
        )
        if name in by_name and any(curve.steps for curve in _top1(by_name[name]))
    ]
    pairs = [name for name in names if name.startswith("distill/pair")]
    losses = [v for n in pairs for s in by_name[n] for v in s.loss.values if math.isfinite(v)]
    limits = (min(losses), max(losses)) if losses else (0.0, 1.0)
    margin = 0.05 * (limits[1] - limits[0]) or 0.1
    return {
        "students": figures.accuracy_curves("Accuracy of the students by epoch", students, {})
        if students
        else "",
        "others": figures.accuracy_curves("Accuracy of meta model and teacher", others, {})
        if others
        else "",
        "pairs": [
            figures.loss_curves(
                n.removeprefix("distill/"),
                [stage.loss for stage in by_name[n]],
                color=SERIES[0],
                y_limits=(limits[0] - margin, limits[1] + margin),
            )
            for n in pairs
            if any(stage.loss.steps for stage in by_name[n])
        ],
        "stages": [
            figures.loss_curves(n, [stage.loss for stage in by_name[n]], color=SERIES[2])
            for n in names
            if n not in pairs and any(stage.loss.steps for stage in by_name[n])
        ],
    }


def _student_stages(by_name: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("end_to_end", "m2mkd")] if "end_to_end" in by_name else []
    baselines = [name for name in by_name if name.startswith("baselines/")]
    return found + [(name, name.removeprefix("baselines/")) for name in baselines]


def _top1(stages: list[Stage]) -> list[Curve]:
    return [stage.top1 for stage in stages]


def _grades(records: list[Record]) -> dict[str, Any] | None:
    graded = [record.grades for record in records if record.grades is not None]
    if not graded:
        return None
    first = graded[0]
    names = first["class_names"]
    matrix_CC = np.zeros((len(names), len(names)), dtype=np.int64)
    for grades in graded:
        for true, predicted, count in grades["confusion"]:
            matrix_CC[true, predicted] += count
    mixed_up = [(int(matrix_CC[i, j]), names[i], names[j]) for i, j in _off_diagonal(matrix_CC)]
    totals = np.array([[n for n, _ in grades["classes"]] for grades in graded]).sum(axis=0)
    correct = np.array([[n for _, n in grades["classes"]] for grades in graded]).sum(axis=0)
    hardest = sorted(
        (
            (100.0 * c / t, names[i])
            for i, (t, c) in enumerate(zip(totals, correct, strict=True))
            if t
        ),
    )
    return {
        "num_runs": len(graded),
        "count": first["count"],
        "ece": [grades["ece"] for grades in graded],
        "ece_mean": statistics.fmean(grades["ece"] for grades in graded),
        "reliability": figures.reliability(_pooled_bins([grades["bins"] for grades in graded])),
        "confusion": figures.confusion(matrix_CC, names) if len(names) <= _MOST_CLASSES else "",
        "mixed_up": mixed_up[:8],
        "hardest": hardest[:8],
        "experts": _experts(first["experts"]),
        "mistakes": first["mistakes"],
        "class_names": names,
    }


def _off_diagonal(matrix_CC: Any) -> list[tuple[int, int]]:
    counts = matrix_CC - np.diag(np.diag(matrix_CC))
    order = np.argsort(-counts, axis=None, kind="stable")[:8]
    cells = [divmod(int(k), counts.shape[1]) for k in order]
    return [(i, j) for i, j in cells if counts[i, j]]


def _pooled_bins(bins: list[list[list[float]]]) -> list[list[float]]:
    """Adds up the confidence bins of several runs."""
    pooled = []
    for rows in zip(*bins, strict=True):
        count = sum(row[0] for row in rows)
        means = [sum(row[0] * row[k] for row in rows) / max(1, count) for k in (1, 2)]
        pooled.append([count, *means])
    return pooled


def _experts(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Shares by expert of every MoE layer, and how uneven they are."""
    if not layers:
        return None
    rows = []
    for layer in layers:
        taken = sum(layer["rows"])
        shares = [count / max(1, taken) for count in layer["rows"]]
        even = 1.0 / len(shares)
        rows.append(
            {
                "name": layer["name"].removesuffix(".mlp"),
                "shares": shares,
                "busiest": max(shares) / even,
                "idlest": min(shares) / even,
                "variation": statistics.pstdev(shares) / even,
                "dropped": max(0.0, 1.0 - taken / max(1, layer["choices"])),
            }
        )
    return {
        "rows": rows,
        "figure": figures.expert_load([(row["name"], row["shares"]) for row in rows]),
        "drops": any(row["dropped"] > 0.0 for row in rows),
    }


def _circuits(record: Record) -> list[dict[str, Any]]:
    """Circuits of a NAC, their pictures as base64."""
    entries = (record.grades or {}).get("circuits", [])
    history = {"title": "The circuit over end-to-end training", "file": HISTORY, "statistics": {}}
    found = []
    for entry in [*entries, history] if entries else []:
        path = record.path / "circuits" / entry["file"]
        if path.is_file():
            picture = base64.b64encode(path.read_bytes()).decode()
            numbers = [(name.replace("_", " "), n) for name, n in entry["statistics"].items()]
            found.append({"title": entry["title"], "png": picture, "statistics": numbers})
    return found


def _corruptions(record: Record) -> dict[str, Any] | None:
    if record.corruptions is None:
        return None
    found = record.corruptions
    table = sorted(found["top1"].items(), key=lambda item: statistics.fmean(item[1]))
    means = [statistics.fmean(values) for values in zip(*found["top1"].values(), strict=True)]
    series = [
        (name.replace("_", " "), SERIES[i % len(SERIES)], values)
        for i, (name, values) in enumerate(table)
    ]
    return {
        "figure": figures.severity_curves([*series, ("mean", SERIES[0], means)], found["clean"]),
        "rows": [(name.replace("_", " "), v, statistics.fmean(v)) for name, v in table],
        "means": means,
        "mean": statistics.fmean(means),
        "clean": found["clean"],
        "count": found["count"],
    }


def _cost(record: Record) -> dict[str, Any]:
    """Steps, time and speed of every stage; pairs trained together share one line."""
    joint = [stage for stage in record.pairs if stage.done.get("trained") == "joint"]
    stages = [stage for stage in record.stages.values() if stage not in joint]
    rows = [_cost_row(stage, record) for stage in stages if stage.done]
    if joint:
        done = record.joint_done
        together = Stage("distill, all pairs", Curve([], []), Curve([], []), joint[0].epochs, done)
        index = sum(
            1 for row in rows if row["name"] in ("meta", "incubation", "teacher", "alignment")
        )
        rows.insert(index, _cost_row(together, record))
    longest = max((row["seconds"] for row in rows), default=0.0)
    for row in rows:
        row["bar"] = 100.0 * row["seconds"] / longest if longest else 0.0
    return {"rows": rows, "total": sum(row["seconds"] for row in rows)}


def _cost_row(stage: Stage, record: Record) -> dict[str, Any]:
    steps = int(stage.done.get("steps", 0))
    seconds = float(stage.done.get("seconds", 0.0))
    data = record.recipe.data_of(stage.name)
    images = steps * int(stage.done.get("images_per_step", data.batch_size * data.accumulate))
    return {
        "name": stage.name,
        "epochs": stage.epochs,
        "steps": steps,
        "seconds": seconds,
        "speed": images / seconds if seconds else 0.0,
    }
