"""The report of a run: what the grades count, what the page holds, and which runs go together."""

import json
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_recipe

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models.checkpoint import load_model
from m2mkd.nn import MoEMlp
from m2mkd.recipe import load_recipe
from m2mkd.train.data import ImageData
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter
from m2mkd.train.report import grades as grading
from m2mkd.train.report import rebuild_report, write_report
from m2mkd.train.report.figures import confusion
from m2mkd.train.report.page import _cost, chance_range, duration, gains, t_interval
from m2mkd.train.report.record import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    out = tmp_path_factory.mktemp("report") / "run"
    train(tiny_recipe(), out, Reporter(quiet=True))
    return out


class Page(HTMLParser):
    """Collects what a page holds, and fails on tags that do not match."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data.split(":")[0])


def test_a_finished_run_has_a_page_with_every_part(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.headings == [
        "What m2mKD gained",
        "Learning curves",
        "Hybrids",
        "Training losses",
        "Load of the experts",
        "Calibration and confusion",
        "Time and throughput",
        "Recipe and versions",
    ]


def test_the_page_loads_nothing_and_is_small(run: Path) -> None:
    text = (run / "report.html").read_text()
    for name, value in Page(text).attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("data:", "#")), (name, value)
    assert not re.search(r"@import|url\((?!#)", text) and "<script" not in text
    assert len(text) < 1_000_000


def test_ids_on_the_page_are_unique(run: Path) -> None:
    ids = Page((run / "report.html").read_text()).ids
    assert ids and len(ids) == len(set(ids))


def test_pictures_take_every_colour_from_the_theme(run: Path) -> None:
    for svg in re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(), flags=re.DOTALL):
        assert not re.search(r"(fill|stroke): #", svg)


def test_the_page_says_what_the_summary_says(run: Path) -> None:
    text = (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    for value in (summary["accuracy"]["m2mkd"], summary["accuracy"]["teacher"]):
        assert f"{value:.2f}" in text
    for gain in summary["gain"].values():
        assert f"{gain:+.2f}".replace("-", "\N{MINUS SIGN}") in text


def test_recipe_text_cannot_break_out_of_the_page(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "run"
    shutil.copytree(run, hostile)
    path = hostile / "recipe.yaml"
    path.write_text(
        path.read_text().replace("name: tiny", "name: tiny # <script>alert(1)</script>")
    )
    assert "<script" not in write_report([hostile], tmp_path / "r.html").read_text()


def test_a_run_under_way_gives_a_page_of_what_there_is(tmp_path: Path) -> None:
    for stage in ("meta", "teacher"):
        train(tiny_recipe(), tmp_path / "run", Reporter(quiet=True), stage=stage)
    rebuild_report([tmp_path / "run"], tmp_path / "r.html", Reporter(quiet=True))
    page = Page((tmp_path / "r.html").read_text())
    assert page.headings[0] == "Not finished" and "Training losses" in page.headings
    assert "What m2mKD gained" not in page.headings


class Watching(Reporter):
    """Notes which stages the report shows whenever a stage begins to train."""

    def __init__(self, report: Path) -> None:
        super().__init__(quiet=True)
        self.report = report
        self.seen: list[tuple[str, bool, bool]] = []
        self.lines: list[str] = []

    def start(self, name: str, total: int, done: int) -> None:
        super().start(name, total, done)
        text = self.report.read_text() if self.report.is_file() else ""
        self.seen.append((name, "Accuracy of meta model and teacher" in text, "pair-01" in text))

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_the_report_is_written_anew_after_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    watching = Watching(out / "report.html")
    train(tiny_recipe(baselines=["end_to_end_only"]), out, watching)
    assert watching.seen == [
        ("meta", False, False),
        *(("incubation", True, False), ("teacher", True, False)),
        ("distill/joint", True, False),
        *(("end_to_end", True, True), ("baselines/end_to_end_only", True, True)),
    ]
    refresh = ("http-equiv", "refresh")
    assert refresh not in Page((out / "report.html").read_text()).attributes

    # Of other settings: the old results are not shown as theirs, and the browser looks again.
    other = tiny_recipe(baselines=["end_to_end_only"], end_to_end={"epochs": 1, "lr": 1e-3})
    train(other, out, watching, stage="end_to_end")
    page = Page((out / "report.html").read_text())
    assert page.headings[0] == "Not finished" and refresh in page.attributes


def test_throughput_counts_the_images_of_whole_steps(tmp_path: Path) -> None:
    small = tiny_recipe(data__batch_size=8, data__accumulate=4)
    train(small, tmp_path / "run", Reporter(quiet=True), stage="meta")
    (row,) = _cost(read_run(tmp_path / "run"))["rows"]
    assert row["steps"] == 10 and row["speed"] * row["seconds"] == pytest.approx(2 * 160)


def test_a_report_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    out, watching = tmp_path / "run", Watching(tmp_path / "run" / "report.html")
    (out / "incubation").mkdir(parents=True)
    (out / "incubation" / "metrics.jsonl").write_text('{"step": 1, "lo')  # another job is at it
    train(tiny_recipe(), out, watching, stage="meta")
    assert (out / "meta" / "DONE").is_file() and not watching.report.exists()
    assert any("report is not up to date: cannot read" in line for line in watching.lines)


def test_several_seeds_are_shown_with_their_spread(run: Path, tmp_path: Path) -> None:
    runs = [run]
    for seed in (1, 2):
        other = tmp_path / f"seed-{seed}"
        shutil.copytree(run, other)
        recipe = other / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("seed: 0", f"seed: {seed}"))
        summary = json.loads((other / "summary.json").read_text())
        for name in summary["gain"]:
            summary["gain"][name] += seed
        (other / "summary.json").write_text(json.dumps(summary))
        runs.append(other)
    text = write_report(runs, tmp_path / "r.html").read_text()
    assert "mean of 3 seeds" in text and "confidence interval of the gain over 3 seeds" in text
    base = json.loads((run / "summary.json").read_text())["gain"]["logit_kd"]
    assert f"{base + 1:+.2f}".replace("-", "\N{MINUS SIGN}") in text


def test_runs_of_different_recipes_do_not_go_on_one_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (run / "recipe.yaml").read_text().replace("alpha: 0.5", "alpha: 0.25", 1)
    (other / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="they differ in distill"):
        write_report([run, other], tmp_path / "r.html")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no recipe\.yaml"):
        write_report([tmp_path], tmp_path / "r.html")


class FixedLogits(nn.Module):
    """Answers with given logits, batch after batch."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.logits_NC = logits_NC
        self.position = 0

    def forward(self, images: Tensor) -> Tensor:
        rows = self.logits_NC[self.position : self.position + len(images)]
        self.position += len(images)
        return rows


def digits() -> ImageData:
    return ImageData(tiny_recipe().data, seed=0)


def test_grades_of_known_answers_are_right() -> None:
    data = digits()
    labels = torch.from_numpy(data.validation.labels)
    # 9 of 10 wherever the label is not 3, and always 4 for a 3: sure of itself at 0.9.
    answers = torch.where(labels == 3, 4, labels)
    probabilities = torch.full((len(labels), 10), 0.1 / 9)
    probabilities[torch.arange(len(labels)), answers] = 0.9
    grades = grading.grade(FixedLogits(probabilities.log()), data, torch.device("cpu"))
    threes = int((labels == 3).sum())
    right = (len(labels) - threes) / len(labels)
    assert grades["count"] == len(labels)
    assert grades["top1"] == pytest.approx(100 * right, abs=1e-3)
    assert grades["ece"] == pytest.approx(abs(right - 0.9), abs=1e-4)
    assert sum(row[0] for row in grades["bins"]) == len(labels)
    assert grades["classes"][3] == [threes, 0]
    assert [3, 4, threes] in grades["confusion"]
    assert len(grades["mistakes"]) == 12
    assert all(item["true"] == 3 and item["predicted"] == 4 for item in grades["mistakes"])


def test_certainty_belongs_to_the_last_bin_and_zero_to_the_first() -> None:
    bins = np.zeros((grading.BINS, 3))
    grading._count_bins(bins, torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert bins[0, 0] == 1 and bins[-1].tolist() == [1, 1, 1]


def test_expert_rows_are_the_tokens_that_the_layer_routes(run: Path) -> None:
    model, _ = load_model(run)
    seen: list[Any] = []
    layer = next(m for m in model.modules() if isinstance(m, MoEMlp))
    images = torch.randn(5, 1, 8, 8)
    with grading.expert_rows(model) as layers:
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(images)
        handle.remove()
    tokens = seen[0].reshape(-1, seen[0].shape[-1])
    _, experts = layer.router(tokens).topk(2, dim=1)
    assert layers[0]["rows"] == experts.flatten().bincount(minlength=3).tolist()
    assert layers[0]["choices"] == 2 * len(tokens)
    assert [entry["name"] for entry in layers] == ["blocks.0.mlp", "blocks.1.mlp"]
    with grading.expert_rows(model) as closed:
        pass
    model(images)
    assert closed[0]["rows"] == [0, 0, 0]


def test_capacity_shows_as_dropped_choices() -> None:
    layer = MoEMlp(8, 8, num_experts=4, num_selected=1, eval_capacity_factor=0.5).eval()
    rows = layer.expert_rows(torch.randn(64, 8))
    assert int(rows.max()) <= 8 and int(rows.sum()) < 64


def test_grades_of_another_student_are_not_used(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    assert grading.read_grades(other) is not None
    done = json.loads((other / "end_to_end" / "DONE").read_text())
    (other / "end_to_end" / "DONE").write_text(json.dumps({**done, "digest": "other"}))
    assert grading.read_grades(other) is None


def test_rebuilding_grades_a_run_that_has_none(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    expected = json.loads((other / "grades.json").read_text())
    (other / "grades.json").unlink()
    rebuild_report([other], other / "report.html", Reporter(quiet=True))
    assert json.loads((other / "grades.json").read_text()) == expected
    assert (other / "report.html").read_text().count("<svg") > 10
    assert load_recipe(str(other / "recipe.yaml")).name == "tiny"


def test_damage_is_on_the_page_when_it_was_measured(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    done = json.loads((other / "end_to_end" / "DONE").read_text())
    top1 = {"gaussian_noise": [9.0, 8.0, 7.0, 6.0, 5.0], "jpeg": [9.5, 9.0, 8.5, 8.0, 7.5]}
    found = {"clean": 10.0, "count": 500, "top1": top1, "mean": 7.75, "digest": done["digest"]}
    (other / "corruptions.json").write_text(json.dumps(found))
    text = write_report([other], other / "report.html").read_text()
    assert "Under corruption" in Page(text).headings and "gaussian noise" in text
    (other / "corruptions.json").write_text(json.dumps({**found, "digest": "of another student"}))
    assert "Under corruption" not in write_report([other], other / "report.html").read_text()


def test_a_recipe_that_asks_for_it_measures_damage(tmp_path: Path) -> None:
    train(tiny_recipe(corruptions=True, baselines=[]), tmp_path / "run", Reporter(quiet=True))
    assert "Under corruption" in Page((tmp_path / "run" / "report.html").read_text()).headings


def test_circuits_of_a_nac_are_on_the_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    model = timm.create_model("nac_digits", num_classes=10, inputs_to="first")
    circuits = grading.draw_circuits(model, other / "circuits")
    assert [entry["file"] for entry in circuits] == ["layer-00.png", "layer-01.png"]
    assert circuits[0]["statistics"]["receivers"] == 24
    grades = json.loads((other / "grades.json").read_text())
    (other / "grades.json").write_text(json.dumps({**grades, "circuits": circuits}))
    text = write_report([other], other / "report.html").read_text()
    assert "Circuits" in Page(text).headings and text.count('class="plate"') == 2
    shutil.copy(other / "circuits" / "layer-00.png", other / "circuits" / grading.HISTORY)
    text = write_report([other], other / "report.html").read_text()
    assert text.count('class="plate"') == 3 and "over end-to-end training" in text


def test_other_networks_have_no_circuits(run: Path, tmp_path: Path) -> None:
    assert grading.draw_circuits(load_model(run)[0], tmp_path / "circuits") == []
    assert not (tmp_path / "circuits").exists()


def test_names_of_classes_are_drawn_as_they_are() -> None:
    names = ["cents_$", "$\\frac$", "\u732b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = confusion(np.eye(3), names)
    assert all(name in svg for name in names)


def test_the_interval_of_gains_is_students_t_over_seeds() -> None:
    low, high = t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert t_interval([1.0]) is None
    found = gains([{"gain": {"a": 1.0, "b": 2.0}}, {"gain": {"a": 3.0}}])
    assert [(gain.name, gain.mean, gain.by_seed) for gain in found] == [("a", 2.0, [1.0, 3.0])]


def test_the_range_of_chance_is_that_of_a_binomial() -> None:
    assert chance_range(50.0, 100) == pytest.approx(9.8)
    assert chance_range(100.0, 100) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.24, "8.2 s"),
        (59.97, "1 min 0 s"),
        (200, "3 min 20 s"),
        (2500, "41 min"),
        (18720, "5 h 12 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
