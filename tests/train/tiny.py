"""A recipe that runs all stages in seconds, and reading what it left."""

import json
from pathlib import Path
from typing import Any

from m2mkd.recipe import Recipe, validate
from m2mkd.train.progress import Reporter

SCHEDULE = {"epochs": 2, "lr": 1e-3, "warmup_epochs": 1, "clip_grad": 1.0}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "data": {
        "dataset": "digits",
        "image_size": 8,
        "channels": 1,
        "batch_size": 32,
        "train_limit": 160,
        "augment": {"crop_scale": [0.7, 1.0], "label_smoothing": 0.1, "mixup": 0.2},
    },
    "meta": SCHEDULE,
    "teacher": {
        "model": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2},
        "depths": [2, 2],
        "incubate": {**SCHEDULE, "drop_path": 0.1},
        "finetune": SCHEDULE,
    },
    "student": {
        "model": "vmoe_tiny_patch16_224",
        "model_args": {
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "num_experts": 3,
            "router_noise": 1.0,
            "act_layer": "gelu_tanh",
        },
        "depths": [1, 1],
    },
    "distill": {"schedule": SCHEDULE, "stitch": "linear", "assembly": "fold"},
    "end_to_end": SCHEDULE,
    "baselines": ["end_to_end_only", "equal_updates", "logit_kd"],
}


def tiny_recipe(**changes: Any) -> Recipe:
    """The tiny recipe with changed values; keys may be dotted, with `__` for the dots."""
    values = json.loads(json.dumps(VALUES))
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return validate(values, source="tiny")


def metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Every metrics.jsonl of a run, by folder."""
    return {
        str(path.parent.relative_to(run)): [json.loads(x) for x in path.read_text().splitlines()]
        for path in sorted(run.rglob("metrics.jsonl"))
    }


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets a chance to save."""


class KillingReporter(Reporter):
    """Kills the run in a given job after a given step."""

    def __init__(self, job: str = "", step: int = 0) -> None:
        super().__init__(quiet=True)
        self.victim = (job, step)
        self.job = ""
        self.reported: list[tuple[str, int]] = []

    def start(self, name: str, total: int, done: int = 0) -> None:
        super().start(name, total, done)
        self.job = name

    def step(self, done: int, **numbers: float) -> None:
        super().step(done, **numbers)
        self.reported.append((self.job, done))
        if (self.job, done) == self.victim:
            raise Killed
