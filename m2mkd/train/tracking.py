"""Experiment trackers by name, through accelerate: each job is one run of the tracker."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import PartialState, tracking
from accelerate.utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from m2mkd.errors import ConfigError, first_line
from m2mkd.recipe import Recipe

_IS_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}


def check_trackers(names: tuple[str, ...]) -> None:
    """Lets a tracker that is not installed fail before anything is trained.

    Raises:
        ConfigError: Its package is missing; the message names the extra that brings it.
    """
    for name in names:
        if not _IS_AVAILABLE[name]():
            raise ConfigError(
                f"tracking: {name} is not installed; run `pip install 'm2mkd[{name}]'` or leave it "
                "out of tracking"
            )


class Tracking:
    """Sends the numbers of one job to the recipe's trackers; use as a context manager.

    A tracker's project (experiment) is the recipe's name. Its runs are called after the job, such
    as `distill/pair-00`, and carry the recipe's settings. TensorBoard's files are in
    `RUN/tracking/`; the others are configured by their own environment variables. One that fails
    later than at its start is left out from then on, with a message; training goes on.

    Args:
        recipe: The run's recipe.
        out: The run folder.
        job: Name of the job.
        message: Takes lines for whoever watches.

    Raises:
        ConfigError: On entering, a tracker that does not start.
    """

    def __init__(
        self, recipe: Recipe, out: Path, job: str, message: Callable[[str], object]
    ) -> None:
        self._trackers: dict[str, Any] = {}
        self._recipe = recipe
        self._out = out
        self._job = job
        self._message = message

    def __enter__(self) -> "Tracking":
        if not self._recipe.tracking or not PartialState().is_main_process:
            return self
        settings = _flat(self._recipe.model_dump(mode="json", exclude={"tracking"}))
        for name in self._recipe.tracking:
            try:
                self._start(name, settings)
            except Exception as error:  # each has errors of its own
                self._finish()
                raise ConfigError(
                    f"tracking: {name} did not start: {first_line(error)}; mend its own settings, "
                    "or leave it out of tracking"
                ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()

    def log(self, line: dict[str, Any]) -> None:
        """Sends one line of metrics.jsonl; `validation` becomes `validation/top1` and so on."""
        if not self._trackers:
            return
        numbers = {k: v for k, v in _flat(line).items() if isinstance(v, (int, float))}
        step = int(numbers.pop("step"))
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # a lost connection must not cost the training
                del self._trackers[name]
                self._message(f"tracking: {name} is left out from now on: {first_line(error)}")

    def _start(self, name: str, settings: dict[str, Any]) -> None:
        tracker = self._make(name)
        if hasattr(tracker, "start"):  # since accelerate 1.8; earlier ones start when made
            tracker.start()
        self._trackers[name] = tracker
        if name != "tensorboard":  # which would make a folder of its own for them
            tracker.store_init_configuration(settings)

    def _finish(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:  # as in log
                self._message(f"tracking: {name} did not finish: {first_line(error)}")
        self._trackers = {}

    def _make(self, name: str) -> Any:
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        project, label = self._recipe.name, f"{self._job} seed {self._recipe.seed}"
        if name == "tensorboard":
            return kind(self._job, logging_dir=self._out / "tracking")
        if name == "mlflow":
            return kind(experiment_name=project, run_name=label)
        options = {"name": label, "group": str(self._out)}
        if name == "wandb":
            options["dir"] = str(self._out)
        return kind(project, **options)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys joined by `/`; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float, str)) or value is None:
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
