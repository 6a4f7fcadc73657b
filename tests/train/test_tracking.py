"""Trackers get what metrics.jsonl gets; one that is not installed is an error before training."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking as accelerate_tracking

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SCHEDULE, metrics, tiny_recipe

from m2mkd.errors import ConfigError, TrainingError
from m2mkd.recipe import load_recipe
from m2mkd.train import tracking
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter, remaining


class FakeTracker:
    """Stands for wandb: remembers what it was told."""

    runs: ClassVar[list["FakeTracker"]] = []

    def __init__(self, project: str, **options: Any) -> None:
        self.project = project
        self.options = options
        self.settings: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.state = "made"
        FakeTracker.runs.append(self)

    def start(self) -> None:
        self.state = "started"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int) -> None:
        assert self.state == "started"
        self.lines.append({"step": step, **values})

    def finish(self) -> None:
        self.state = "finished"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    """wandb is installed, and a fake."""
    FakeTracker.runs = []
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setitem(tracking._IS_AVAILABLE, "wandb", lambda: True)
    return FakeTracker


def test_a_tracker_gets_every_line_of_the_metrics(fake: type[FakeTracker], tmp_path: Path) -> None:
    train(tiny_recipe(tracking=["wandb"]), tmp_path / "run", Reporter(quiet=True), stage="meta")
    (run,) = fake.runs
    assert run.state == "finished" and run.project == "tiny"
    assert run.options["name"] == "meta seed 0"
    assert run.settings["data/batch_size"] == 32 and run.settings["teacher/depths"] == "[2, 2]"
    lines = metrics(tmp_path / "run")["meta"]
    assert [line["step"] for line in run.lines] == [line["step"] for line in lines]
    assert [x["loss"] for x in run.lines if "loss" in x] == [
        x["loss"] for x in lines if "loss" in x
    ]
    top1 = [line["validation"]["top1"] for line in lines if "validation" in line]
    assert [x["validation/top1"] for x in run.lines if "validation/top1" in x] == top1


def test_a_job_that_fails_closes_its_tracker(fake: type[FakeTracker], tmp_path: Path) -> None:
    schedule = {**SCHEDULE, "lr": 1e25, "optimizer": "sgd", "clip_grad": None}
    recipe = tiny_recipe(tracking=["wandb"], meta=schedule)
    with pytest.raises(TrainingError):
        train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    assert fake.runs[0].state == "finished"


def test_a_tracker_that_does_not_start_is_an_error_of_one_line(
    fake: type[FakeTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeTracker) -> None:
        raise RuntimeError("no API key\nread more")

    monkeypatch.setattr(fake, "start", refuse)
    with pytest.raises(ConfigError, match="wandb did not start: no API key; mend its own settings"):
        train(tiny_recipe(tracking=["wandb"]), tmp_path / "run", Reporter(quiet=True), stage="meta")


def test_a_tracker_that_fails_later_does_not_stop_the_training(
    fake: type[FakeTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake.log

    def lose(self: FakeTracker, values: dict[str, Any], step: int) -> None:
        if self.lines:
            raise OSError("connection lost")
        log(self, values, step)

    said: list[str] = []
    reporter = Reporter(quiet=True)
    monkeypatch.setattr(fake, "log", lose)
    monkeypatch.setattr(reporter, "message", said.append)
    train(tiny_recipe(tracking=["wandb"]), tmp_path / "run", reporter, stage="meta")
    assert "tracking: wandb is left out from now on: connection lost" in said
    assert len(fake.runs[0].lines) == 1 and (tmp_path / "run" / "meta" / "DONE").is_file()


def test_tracking_changes_no_result(fake: type[FakeTracker], tmp_path: Path) -> None:
    for name, names in (("with", ["wandb"]), ("without", [])):
        recipe = tiny_recipe(tracking=names)
        train(recipe, tmp_path / name, Reporter(quiet=True), stage="meta")
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    done = [json.loads((tmp_path / n / "meta" / "DONE").read_text()) for n in ("with", "without")]
    assert done[0]["digest"] == done[1]["digest"]


def test_a_tracker_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(tracking._IS_AVAILABLE, "mlflow", lambda: False)
    with pytest.raises(ConfigError, match=r"mlflow is not installed; run `pip install 'm2mkd\[mlf"):
        train(tiny_recipe(tracking=["mlflow"]), tmp_path / "run", Reporter(quiet=True))
    assert not (tmp_path / "run" / "meta").exists()


def test_an_unknown_tracker_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        load_recipe("quickstart", ("tracking=[tensorbord]",))


def test_tensorboard_gets_its_files_in_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(tracking=["tensorboard"])
    train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "meta"))
    events.Reload()
    lines = metrics(tmp_path / "run")["meta"]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(loss)) for step, loss in losses]


def test_the_time_left_follows_from_the_speed_of_this_sitting() -> None:
    assert remaining(10.0, 5, 1800) == "1:00:00"
    assert remaining(0.0, 0, 100) == "0:00:00"
