"""The one training loop: runs any task to the end of its schedule, and can stop at any moment.

Randomness is a function of (seed, stage, step), not of history: every step seeds torch, numpy and
random afresh, and data order and augmentation are functions of the epoch. So a run that was killed
and resumed from a checkpoint computes the same losses as one that was not.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch import Tensor, nn

from m2mkd.errors import (
    CheckpointError,
    ConfigError,
    NotFiniteError,
    TrainingError,
    did_you_mean,
)
from m2mkd.models.checkpoint import (
    Checkpoint,
    amend_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_failure,
    write_text,
)
from m2mkd.recipe import Augmentation, Schedule, digest
from m2mkd.train.data import ImageData
from m2mkd.train.parallel import ELEMENTWISE, make_parallel
from m2mkd.train.progress import Reporter
from m2mkd.train.stopping import StopRequest
from m2mkd.train.world import World

_LOG_EVERY = 10  # optimiser steps between lines of metrics.jsonl
_SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly")  # of timm, to suggest
# Names whose tensors have more than one dimension but are biases or tokens: never decayed.
_NO_DECAY = (
    *("pos_embed", "cls_token", "reg_token", "fc1_bias", "fc2_bias"),
    *("tokenizer.grid", "latents.signatures", "latents.states"),
)


@dataclass
class Context:
    """What all stages of a run share.

    Attributes:
        accelerator: Knows device and precision.
        data: Training images.
        augment: How batches are mixed.
        seed: Source of all randomness.
        reporter: Where progress goes.
        world: The processes of this job.
        stop: Asks for a checkpoint and an end.
        guard: Called before anything is written; raises when this process may not.
        checkpoint_every: Optimiser steps between checkpoints; None means once an epoch.
        track: Gets every line of metrics.jsonl, in process 0.
        parallel: How several processes train a network together, as the recipe's key has it.
        is_compiled: Whether the trained network goes through torch.compile.
        is_recomputed: Whether activations are computed again in the backward pass.
    """

    accelerator: Accelerator
    data: ImageData
    augment: Augmentation
    seed: int
    reporter: Reporter
    world: World = field(default_factory=World)
    stop: StopRequest = field(default_factory=StopRequest)
    guard: Callable[[], None] | None = None
    checkpoint_every: int | None = None
    track: Callable[[dict[str, Any]], None] = lambda line: None
    parallel: str = "ddp"
    is_compiled: bool = False
    is_recomputed: bool = False


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


def fit(job: Job, context: Context) -> dict[str, Any]:
    """Trains a job from its newest checkpoint to the end and marks it as done.

    Returns:
        What is written to its `DONE` file: steps and their size, final loss and last evaluation.

    Raises:
        TrainingError: The loss is not finite.
        CheckpointError: Nothing readable to resume from, or the disk is full.
        Interrupted: `context.stop` was set, in this process or another; the state is saved.
    """
    trainer = _Trainer(job, context)
    trainer.run()
    facts = {"steps": trainer.total, "images_per_step": context.data.images_per_step}
    done = {"digest": job.digest, **facts, **trainer.latest}
    context.world.on_main(lambda: write_text(job.folder / "DONE", json.dumps(done, indent=1)))
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
        self.world = context.world
        job.task.to(self.device)
        if context.is_recomputed:
            _recompute_activations(job.task)
        self.parallel = make_parallel(job.task, self.world, context.parallel)
        self.module = self.parallel.module
        if context.is_compiled:
            for part in _separate_parts(self.module):
                part.compile()
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
        self.stops = False
        self.saved = 0
        self.must_evaluate = False

    def run(self) -> None:
        self._resume()
        reporter = self.context.reporter
        reporter.start(self.job.name, self.total, self.step)
        try:
            if self.must_evaluate:
                self._evaluate(self.step // self.steps_per_epoch - 1)
            for epoch in range(self.step // self.steps_per_epoch, self.job.schedule.epochs):
                self._epoch(epoch)
        finally:
            reporter.finish()
        if self.total == 0:
            self._save()

    def _epoch(self, epoch: int) -> None:
        first = self.step - epoch * self.steps_per_epoch
        began, images_seen = time.monotonic(), 0
        batches = self.context.data.train_batches(epoch, first)
        while step_batches := self._next_of(batches):
            result = self._train_step(step_batches)
            self.step += 1
            images_seen += self.world.size * sum(len(labels) for _, labels in step_batches)
            speed = images_seen / (time.monotonic() - began)
            self._report(result, epoch, speed)
            is_end = self.step % self.steps_per_epoch == 0
            stops = self.stops if self.world.size > 1 else self.context.stop.is_set
            if is_end or self.step % self.every == 0 or stops:
                self._save()
            if is_end:
                self._evaluate(epoch)
            if stops and self.step < self.total:
                raise self.context.stop.exception(
                    f"stopped in {self.job.name} after step {self.step} of {self.total}"
                )

    def _next_of(self, batches: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The batches of one step; where they cannot be read, the steps before it are saved."""
        try:
            return list(islice(batches, self.context.data.accumulate))
        except Exception:  # whatever it is: the network is as the last step left it
            # Several processes save together, and the others do not know.
            if self.world.size == 1 and self.step > self.saved:
                self._save()
            raise

    def _train_step(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        # Processes draw different numbers; process 0 those of a run of one process.
        extra = [self.world.rank] if self.world.rank else []
        seed_everything(self.context.seed, self.job.stage, self.step, *extra)
        self.job.task.train()
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for number, (images, labels) in enumerate(batches, start=1):
            with self.parallel.accumulating(is_last=number == len(batches)):
                result = self._forward(images, labels)
                self.context.accelerator.backward(result["loss"] / len(batches))
            for name, value in result.items():
                if value.ndim == 0:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batches)
        numbers = self._shared(sums)
        if not math.isfinite(numbers["loss"]):
            bad = [k.removesuffix("/loss") for k, v in numbers.items() if not math.isfinite(v)]
            pairs = [f"{name}: " for name in bad if name.startswith("pair-")]
            raise self._not_finite(f"{''.join(pairs[:1])}loss is {numbers['loss']}")
        if self.job.schedule.clip_grad is not None:
            self._clip(self.job.schedule.clip_grad)
        self.optimizer.step()
        return numbers

    def _forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images, targets = self.make_targets(images.to(self.device), labels.to(self.device))
        try:
            with self.context.accelerator.autocast():
                return self.parallel(images, targets)
        except NotFiniteError as error:
            raise self._not_finite(f"{error}") from None

    def _shared(self, numbers: dict[str, float]) -> dict[str, float]:
        """Means over the processes; also whether any of them was asked to stop."""
        values, self.stops = self.world.total_and_stop(numbers.values(), self.context.stop)
        return dict(zip(numbers, (value / self.world.size for value in values), strict=True))

    def _clip(self, limit: float) -> None:
        """Limits the gradient norm of each separately trained module, so that training pairs
        together or alone is the same."""
        if self.context.accelerator.scaler is not None:
            self.context.accelerator.unscale_gradients(self.optimizer)
        for part in _separate_parts(self.module):
            self.parallel.clip_gradients(part, limit)

    def _not_finite(self, what: str) -> TrainingError:
        pointer = self.job.folder / "last"
        kept = (
            f"the last checkpoint is {self.job.folder / pointer.read_text().strip()}"
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
        """Grades what was just saved, so that an evaluation that fails costs no training."""
        if self.job.evaluate is None:
            return
        try:
            numbers = self.job.evaluate()
        except NotFiniteError as error:
            raise self._not_finite(f"evaluation: {error}") from None
        self.latest["validation"] = numbers
        self._log({"step": self.step, "epoch": epoch, "validation": numbers})
        is_best = numbers.get("top1", -math.inf) > self.best
        if is_best:
            self.best = numbers["top1"]
        if not self.world.is_main:
            return
        if self.context.guard is not None:
            self.context.guard()
        facts = {"latest": self._with_seconds(), "best": self._best(), "is_graded": True}
        amend_checkpoint(self.job.folder, self.step, facts, is_best=is_best)

    def _best(self) -> float | None:
        return None if math.isinf(self.best) else self.best

    def _log(self, line: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        try:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise write_failure(self.metrics, error) from error
        self.context.track(line)

    def _save(self) -> None:
        weights = self.parallel.weights()
        state: dict[str, Any] = {"optimizer": self.parallel.optimizer_state(self.optimizer)}
        if not self.world.is_main:
            return
        if self.context.guard is not None:
            self.context.guard()
        if self.context.accelerator.scaler is not None:
            state["scaler"] = self.context.accelerator.scaler.state_dict()
        meta = {
            **self.job.meta,
            "stage": self.job.name,
            "digest": self.job.digest,
            "images_per_step": self.context.data.images_per_step,
            "latest": self._with_seconds(),
            "best": self._best(),
            "is_graded": False,
        }
        write_checkpoint(
            self.job.folder,
            self.step,
            weights,
            meta=meta,
            state=state if self.step < self.total else None,
        )
        self.saved = self.step

    def _with_seconds(self) -> dict[str, Any]:
        """The latest numbers, with the training time of all sittings brought up to date."""
        now = time.monotonic()
        self.latest["seconds"] = round(self.latest.get("seconds", 0.0) + now - self.clock, 2)
        self.clock = now
        return self.latest

    def _resume(self) -> None:
        checkpoint = self._find_checkpoint()
        if checkpoint is None:
            return
        self.step = self.saved = checkpoint.meta["step"]
        self.latest = checkpoint.meta.get("latest", {})
        best = checkpoint.meta.get("best")
        self.best = -math.inf if best is None else best
        is_end = self.step > 0 and self.step % self.steps_per_epoch == 0
        self.must_evaluate = is_end and _lacks_grade(checkpoint.meta)
        try:
            self.parallel.load_weights(checkpoint.weights)
            if self.step < self.total:
                state = checkpoint.state()
                self.parallel.load_optimizer_state(self.optimizer, state["optimizer"])
                if self.context.accelerator.scaler is not None:
                    self.context.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{checkpoint.path} does not fit: {detail}") from None
        if 0 < self.step < self.total:
            self.context.reporter.message(
                f"{self.job.name}: going on from step {self.step} of {self.total}"
            )

    def _find_checkpoint(self) -> Checkpoint | None:
        """The step to go on from, the same in every process; process 0 chooses it."""
        found: list[Checkpoint] = []

        def choose() -> str | None:
            checkpoint, problems = newest_checkpoint(self.job.folder)
            for problem in problems:
                self.context.reporter.message(f"{problem}; going on from an earlier step")
            if checkpoint is not None:
                self._check_origin(checkpoint)
                found.append(checkpoint)
            self._tidy(checkpoint)
            return None if checkpoint is None else checkpoint.path.name

        name = self.world.on_main(choose)
        if name is None or found:
            return found[0] if found else None
        return read_checkpoint(self.job.folder / name)

    def _check_origin(self, checkpoint: Checkpoint) -> None:
        if checkpoint.meta.get("digest") != self.job.digest:
            raise CheckpointError(
                f"{checkpoint.path} belongs to other settings; use another --out or --fresh"
            )

    def _tidy(self, checkpoint: Checkpoint | None) -> None:
        """Makes pointers and metrics agree with the step that the run goes on from.

        A kill may have come between a checkpoint and the pointers to it, or its evaluation.
        """
        if checkpoint is None:
            _truncate(self.metrics, 0, is_graded=True)
            return
        write_text(self.job.folder / "last", checkpoint.path.name)
        best = checkpoint.meta.get("best")
        reached = checkpoint.meta.get("latest", {}).get("validation", {}).get("top1")
        is_graded = not _lacks_grade(checkpoint.meta)
        if is_graded and best is not None and best == reached:
            write_text(self.job.folder / "best", checkpoint.path.name)
        _truncate(self.metrics, checkpoint.meta["step"], is_graded=is_graded)


def _lacks_grade(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint was not evaluated; those of earlier versions were, then written."""
    return not meta.get("is_graded", True)


def _separate_parts(module: nn.Module) -> list[nn.Module]:
    """What is trained on its own: each module of a dict of pairs, or the whole network."""
    return list(module.children()) if isinstance(module, nn.ModuleDict) else [module]


def _recompute_activations(task: nn.Module) -> None:
    """Turns on timm's gradient checkpointing in every part that has it, frozen ones included:
    gradients pass through them too."""
    for part in task.modules():
        if hasattr(part, "set_grad_checkpointing"):
            part.set_grad_checkpointing(True)  # type: ignore[operator]


def check_schedule(schedule: Schedule, setting: str, parallel: str = "ddp") -> None:
    """Lets a schedule that cannot be followed fail before anything is trained.

    Args:
        schedule: What to check.
        setting: Its recipe key, for messages.
        parallel: As the recipe's key has it.

    Raises:
        ConfigError: timm does not know the optimiser or scheduler, or the optimiser may look at
            whole tensors, of which a process has its own experts only.
    """
    optimizer = _make_optimizer(nn.Linear(1, 1), schedule, setting)
    _make_scheduler(optimizer, schedule, setting, steps_per_epoch=1)
    if parallel == "experts" and schedule.optimizer.lower() not in ELEMENTWISE:
        raise ConfigError(
            f"{setting}.optimizer={schedule.optimizer!r} does not go with parallel: experts, which "
            f"divides tensors and takes {', '.join(ELEMENTWISE)}; set one of these, or "
            "parallel: ddp"
        )


def _make_optimizer(module: nn.Module, schedule: Schedule, setting: str) -> torch.optim.Optimizer:
    kept = [name for name, _ in module.named_parameters() if name.endswith(_NO_DECAY)]
    groups = param_groups_weight_decay(module, schedule.weight_decay, no_weight_decay_list=kept)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=schedule.optimizer, lr=schedule.lr, weight_decay=schedule.weight_decay
        )
    except (ValueError, AssertionError, TypeError) as error:
        hint = did_you_mean(schedule.optimizer, map(str, list_optimizers()))
        raise ConfigError(f"{setting}.optimizer={schedule.optimizer!r}: {error}{hint}") from None
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
        hint = did_you_mean(schedule.scheduler, _SCHEDULERS) or "; use cosine"
        raise ConfigError(f"{setting}.scheduler={schedule.scheduler!r}: {error}{hint}") from None
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
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [dict(line) for line in lines]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it") from None


def _truncate(metrics: Path, step: int, *, is_graded: bool) -> None:
    """Drops metrics lines of steps after `step`, so that a resumed file has each step once; and
    the evaluation of `step` itself where it will be repeated."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            numbers = json.loads(line)
            is_repeated = numbers["step"] == step and "validation" in numbers and not is_graded
            if numbers["step"] <= step and not is_repeated:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill
    write_text(metrics, "".join(f"{line}\n" for line in kept))
