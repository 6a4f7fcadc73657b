"""The one training loop: runs any task to the end of its schedule, and can stop at any moment.

Randomness is a function of (seed, stage, step), not of history: every step seeds torch, numpy and
random afresh, and data order and augmentation are functions of the epoch. So a run that was killed
and resumed from a checkpoint computes the same losses as one that was not.
"""

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch import Tensor, nn

from m2mkd.errors import CheckpointError, ConfigError, NotFiniteError, TrainingError
from m2mkd.models.checkpoint import (
    newest_checkpoint,
    read_json,
    write_checkpoint,
    write_failure,
    write_text,
)
from m2mkd.recipe import Augmentation, Schedule, digest
from m2mkd.train.data import ImageData
from m2mkd.train.progress import Reporter

_LOG_EVERY = 10  # optimiser steps between lines of metrics.jsonl
# Names whose tensors have more than one dimension but are biases or tokens: never decayed.
_NO_DECAY = (
    *("pos_embed", "cls_token", "reg_token", "fc1_bias", "fc2_bias"),
    *("tokenizer.grid", "latents.signatures", "latents.states"),
)


@dataclass
class Context:
    """What all stages of a run share; `track` gets every line of metrics.jsonl."""

    accelerator: Accelerator
    data: ImageData
    augment: Augmentation
    seed: int
    reporter: Reporter
    checkpoint_every: int | None = None
    track: Callable[[dict[str, Any]], None] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass
class Job:
    """One stage to train.

    Attributes:
        name: As shown, such as `distill/pair-00`.
        stage: Name of its plan, such as `distill`: the source of its randomness.
        task: Maps images and targets to a loss.
        schedule: How long and how fast.
        folder: Where checkpoints and metrics go.
        digest: Hash of everything that determines the result; a checkpoint of another digest is
            refused.
        evaluate: Called after every epoch; its numbers go to metrics.jsonl. `top1`, if among them,
            decides what `best` points to.
        meta: Facts for the checkpoint's meta.json.
        setting: The recipe key of the schedule, for messages.
    """

    name: str
    stage: str
    task: TrainingTask
    schedule: Schedule
    folder: Path
    digest: str
    evaluate: Callable[[], dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    setting: str = ""


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, after saving a checkpoint."""


def fit(job: Job, context: Context) -> dict[str, Any]:
    """Trains a job from its newest checkpoint to the end and marks it as done.

    Returns:
        The numbers written to its `DONE` file: steps, final loss and the last evaluation.

    Raises:
        TrainingError: The loss is not finite.
        CheckpointError: Nothing readable to resume from, or the disk is full.
        Interrupted: `context.stop` was set; the state is saved.
    """
    trainer = _Trainer(job, context)
    with saving_on_signals(context.stop):
        trainer.run()
    done = {"digest": job.digest, "steps": trainer.total, **trainer.latest}
    write_text(job.folder / "DONE", json.dumps(done, indent=1))
    return done


def read_done(folder: Path, expected_digest: str) -> dict[str, Any] | None:
    """The numbers of a stage that is complete with this digest, else None.

    Raises:
        CheckpointError: The `DONE` file cannot be understood.
    """
    path = folder / "DONE"
    if not path.is_file():
        return None
    done = read_json(path)
    return done if done.get("digest") == expected_digest else None


@contextmanager
def saving_on_signals(stop: threading.Event) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM ask for a checkpoint and an orderly end; a second one is abrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def seed_everything(*parts: Any) -> None:
    """Seeds torch, numpy and random from any JSON-able parts."""
    seed = int(digest(*parts), 16) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class _Trainer:
    def __init__(self, job: Job, context: Context) -> None:
        self.job = job
        self.context = context
        self.steps_per_epoch = context.data.steps_per_epoch
        self.total = job.schedule.epochs * self.steps_per_epoch
        self.every = context.checkpoint_every or self.steps_per_epoch
        self.device = context.accelerator.device
        job.task.to(self.device)
        self.module: nn.Module = job.task.get_trainable_module()  # type: ignore[assignment]
        self.optimizer = context.accelerator.prepare(
            _make_optimizer(self.module, job.schedule, job.setting)
        )
        self.scheduler = _make_scheduler(
            self.optimizer, job.schedule, job.setting, self.steps_per_epoch
        )
        self.make_targets = _make_mixer(context.augment, context.data.num_classes)
        self.metrics = job.folder / "metrics.jsonl"
        self.latest: dict[str, Any] = {}
        self.best = -math.inf
        self.clock = time.monotonic()
        self.step = 0

    def run(self) -> None:
        self._resume()
        reporter = self.context.reporter
        reporter.start(self.job.name, self.total, self.step)
        try:
            for epoch in range(self.step // self.steps_per_epoch, self.job.schedule.epochs):
                self._epoch(epoch)
        finally:
            reporter.finish()
        if self.total == 0:
            self._save()

    def _epoch(self, epoch: int) -> None:
        first = self.step - epoch * self.steps_per_epoch
        began, images_seen = time.monotonic(), 0
        for images, labels in self.context.data.train_batches(epoch, first):
            result = self._train_step(images, labels)
            self.step += 1
            images_seen += len(labels)
            speed = images_seen / (time.monotonic() - began)
            self._report(result, epoch, speed)
            is_end = self.step % self.steps_per_epoch == 0
            if is_end:
                self._evaluate(epoch)
            if is_end or self.step % self.every == 0 or self.context.stop.is_set():
                self._save()
            if self.context.stop.is_set() and self.step < self.total:
                raise Interrupted(
                    f"stopped in {self.job.name} after step {self.step} of {self.total}"
                )

    def _train_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        seed_everything(self.context.seed, self.job.stage, self.step)
        images, targets = self.make_targets(images.to(self.device), labels.to(self.device))
        self.job.task.train()
        self.scheduler.step_update(self.step)
        try:
            with self.context.accelerator.autocast():
                result = self.job.task(images, targets)
        except NotFiniteError as error:
            raise self._not_finite(f"{error}") from None
        numbers = {k: float(v.detach()) for k, v in result.items() if v.ndim == 0}
        if not math.isfinite(numbers["loss"]):
            bad = [k.removesuffix("/loss") for k, v in numbers.items() if not math.isfinite(v)]
            pairs = [f"{name}: " for name in bad if name.startswith("pair-")]
            raise self._not_finite(f"{''.join(pairs[:1])}loss is {numbers['loss']}")
        self.optimizer.zero_grad(set_to_none=True)
        self.context.accelerator.backward(result["loss"])
        if self.job.schedule.clip_grad is not None:
            self._clip(self.job.schedule.clip_grad)
        self.optimizer.step()
        return numbers

    def _clip(self, limit: float) -> None:
        """Limits the gradient norm of each separately trained module, so that training pairs
        together or alone is the same."""
        if self.context.accelerator.scaler is not None:
            self.context.accelerator.unscale_gradients(self.optimizer)
        is_pairs = isinstance(self.module, nn.ModuleDict)
        for part in self.module.children() if is_pairs else (self.module,):
            torch.nn.utils.clip_grad_norm_(part.parameters(), limit)

    def _not_finite(self, what: str) -> TrainingError:
        pointer = self.job.folder / "last"
        kept = (
            f"the last good checkpoint is {self.job.folder / pointer.read_text().strip()}"
            if pointer.is_file()
            else "no checkpoint was written yet"
        )
        lr = self.job.schedule.lr
        return TrainingError(
            f"stage {self.job.name}, step {self.step}: {what}; {kept}; lower "
            f"{self.job.setting}.lr (now {lr:g}) or set {self.job.setting}.clip_grad"
        )

    def _report(self, numbers: dict[str, float], epoch: int, speed: float) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        self.latest["loss"] = numbers["loss"]
        self.context.reporter.step(self.step, loss=numbers["loss"], lr=lr, images_per_second=speed)
        if self.step % _LOG_EVERY == 0 or self.step in (1, self.total):
            self._log({"step": self.step, "epoch": epoch, "lr": lr, **numbers})

    def _evaluate(self, epoch: int) -> None:
        if self.job.evaluate is None:
            return
        try:
            numbers = self.job.evaluate()
        except NotFiniteError as error:
            raise self._not_finite(f"evaluation: {error}") from None
        self.latest["validation"] = numbers
        self._log({"step": self.step, "epoch": epoch, "validation": numbers})

    def _log(self, line: dict[str, Any]) -> None:
        try:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise write_failure(self.metrics, error) from error
        self.context.track(line)

    def _save(self) -> None:
        accuracy = self.latest.get("validation", {}).get("top1")
        is_best = accuracy is not None and accuracy > self.best
        if is_best:
            self.best = accuracy
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.context.accelerator.scaler is not None:
            state["scaler"] = self.context.accelerator.scaler.state_dict()
        meta = {
            **self.job.meta,
            "stage": self.job.name,
            "digest": self.job.digest,
            "latest": self._with_seconds(),
            "best": None if math.isinf(self.best) else self.best,
        }
        write_checkpoint(
            self.job.folder,
            self.step,
            self.module.state_dict(),
            meta=meta,
            state=state if self.step < self.total else None,
            is_best=is_best,
        )

    def _with_seconds(self) -> dict[str, Any]:
        """The latest numbers, with the training time of all sittings brought up to date."""
        now = time.monotonic()
        self.latest["seconds"] = round(self.latest.get("seconds", 0.0) + now - self.clock, 2)
        self.clock = now
        return self.latest

    def _resume(self) -> None:
        checkpoint, problems = newest_checkpoint(self.job.folder)
        for problem in problems:
            self.context.reporter.message(f"{problem}; going on from an earlier step")
        if checkpoint is None:
            _truncate(self.metrics, 0)
            return
        if checkpoint.meta.get("digest") != self.job.digest:
            raise CheckpointError(
                f"{checkpoint.path} belongs to other settings; use another --out or --fresh"
            )
        # A kill may have come between the checkpoint and the pointer to it.
        write_text(self.job.folder / "last", checkpoint.path.name)
        self.step = checkpoint.meta["step"]
        self.latest = checkpoint.meta.get("latest", {})
        best = checkpoint.meta.get("best")
        self.best = -math.inf if best is None else best
        if best is not None and best == self.latest.get("validation", {}).get("top1"):
            write_text(self.job.folder / "best", checkpoint.path.name)
        try:
            self.module.load_state_dict(checkpoint.weights)
            if self.step < self.total:
                state = checkpoint.state()
                self.optimizer.load_state_dict(state["optimizer"])
                if self.context.accelerator.scaler is not None:
                    self.context.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{checkpoint.path} does not fit: {detail}") from None
        _truncate(self.metrics, self.step)
        if 0 < self.step < self.total:
            self.context.reporter.message(
                f"{self.job.name}: going on from step {self.step} of {self.total}"
            )


def check_schedule(schedule: Schedule, setting: str) -> None:
    """Lets a schedule that cannot be followed fail before anything is trained.

    Raises:
        ConfigError: timm does not know the optimiser or scheduler.
    """
    optimizer = _make_optimizer(nn.Linear(1, 1), schedule, setting)
    _make_scheduler(optimizer, schedule, setting, steps_per_epoch=1)


def _make_optimizer(module: nn.Module, schedule: Schedule, setting: str) -> torch.optim.Optimizer:
    kept = [name for name, _ in module.named_parameters() if name.endswith(_NO_DECAY)]
    groups = param_groups_weight_decay(module, schedule.weight_decay, no_weight_decay_list=kept)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=schedule.optimizer, lr=schedule.lr, weight_decay=schedule.weight_decay
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"{setting}.optimizer={schedule.optimizer!r}: {error}") from None
    return optimizer


def _make_scheduler(optimizer: Any, schedule: Schedule, setting: str, steps_per_epoch: int) -> Any:
    try:
        scheduler, _ = create_scheduler_v2(
            getattr(optimizer, "optimizer", optimizer),
            sched=schedule.scheduler,
            num_epochs=max(1, schedule.epochs),
            min_lr=min(schedule.min_lr, schedule.lr),
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=min(schedule.warmup_lr, schedule.lr),
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{setting}.scheduler={schedule.scheduler!r}: {error}") from None
    if scheduler is None or schedule.scheduler == "plateau":
        raise ConfigError(
            f"{setting}.scheduler={schedule.scheduler!r} does not follow from the step alone, "
            "which resuming needs; use cosine"
        )
    return scheduler


def _make_mixer(
    augment: Augmentation, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns what turns images and labels [B] into (mixed) images and probabilities [B, C]."""
    smoothing = augment.label_smoothing

    def smooth(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, mixup_target(labels, num_classes, lam=1.0, smoothing=smoothing)

    if not augment.mixes_images:
        return smooth
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(labels) == 1:
            return smooth(images, labels)
        even = len(labels) - len(labels) % 2  # mixup pairs images; a skipped one can leave one over
        mixed: tuple[Tensor, Tensor] = mixup(images[:even].clone(), labels[:even])
        return mixed

    return mix


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a stage's metrics.jsonl; none when there is no such file.

    Raises:
        CheckpointError: A line is no JSON.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it") from None


def _truncate(metrics: Path, step: int) -> None:
    """Drops metrics lines of steps after `step`, so that a resumed file has each step once."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line cut short by a kill
    write_text(metrics, "".join(f"{line}\n" for line in kept))
