"""Times joint distillation of L pairs against L separate runs, and counts FLOPs of both.

    python benchmarks/bench_distill.py quickstart nac_digits --threads 1 --clock cpu
    M2MKD_NO_EXTENSION=1 python benchmarks/bench_distill.py quickstart nac_digits --count

The networks are those of a recipe, with fresh weights. `joint` is some optimiser steps of all pairs
at once; `separate` as many of each pair alone, pair after pair: as many samples x pairs, so the
ratio of times is that of samples x pairs per second. Both run in every round, in this process. They
are timed twice, with reading and augmenting the images and without; a joint run reads them once,
separate runs once each.

`--count` counts the FLOPs of matrix products and convolutions, forward and backward, of one step
per image: `published` is arXiv 2402.16918 written out, pair by pair the prefix without gradient,
then the rest of the teacher hybrid and of the student hybrid. Compiled kernels are invisible to the
counter, so it wants the references; they count a NAC's attention as if every link were there.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import choose_clock, machine, measure
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2mkd.distill import PairLossSettings, PairsTask
from m2mkd.distill.losses import distillation_loss
from m2mkd.models import split_vit
from m2mkd.ops import status
from m2mkd.recipe import Recipe, load_recipe
from m2mkd.train.data import ImageData
from m2mkd.train.networks import Networks

Batch = tuple[Tensor, Tensor]


class Learner:
    """A task and its optimiser."""

    def __init__(self, task: PairsTask) -> None:
        self.task = task.train()
        self.optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=1e-4)

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.task(*batch)["loss"].backward()
        self.optimizer.step()


@dataclass
class Setting:
    """A recipe's data, and learners of all its pairs: together, and one by one."""

    data: ImageData
    joint: Learner
    separate: list[Learner]

    def batches(self) -> Iterator[Batch]:
        """Training batches without end."""
        smoothing = 0.1
        for epoch in itertools.count():
            for images, labels in self.data.train_batches(epoch):
                yield images, mixup_target(labels, self.data.num_classes, 1.0, smoothing)


def prepare(recipe: Recipe) -> Setting:
    """Builds what is compared."""
    data = ImageData(recipe.data, recipe.seed)
    networks = Networks(recipe, data)
    distill = recipe.distill
    settings = PairLossSettings(
        alpha=distill.alpha,
        temperature=distill.temperature,
        kd=distill.kd,
        kd_reduction=distill.kd_reduction,
        boundary_weight=distill.boundary_weight,
    )
    indices = range(networks.num_modules)

    def learner(*pairs: int) -> Learner:
        students = networks.student_modules()
        teachers = split_vit(networks.teacher(), networks.teacher_depths)
        meta = split_vit(networks.meta(), [1] * networks.num_modules)
        return Learner(
            PairsTask(
                list(meta),
                {i: students[i] for i in pairs},
                {i: teachers[i] for i in pairs},
                settings,
            )
        )

    return Setting(data, learner(*indices), [learner(i) for i in indices])


def time_forms(
    setting: Setting, args: argparse.Namespace, is_loading: bool
) -> dict[str, dict[str, float]]:
    """How many times longer separate steps take than joint ones."""
    ready = list(itertools.islice(setting.batches(), args.steps))
    learners = [setting.joint, *setting.separate]
    sources = {learner: setting.batches() for learner in learners}

    def steps(learner: Learner) -> None:
        source = sources[learner] if is_loading else iter(ready)
        for batch in itertools.islice(source, args.steps):
            learner.step(batch)

    forms = {
        "joint": lambda: steps(setting.joint),
        "separate": lambda: [steps(learner) for learner in setting.separate],
    }
    return measure(forms, "joint", args.rounds, choose_clock("cpu", args.clock))


def count_forms(setting: Setting) -> dict[str, float]:
    """Millions of floating-point operations per image: of the published procedure, and of ours."""
    batch = next(setting.batches())

    def counted(run: Callable[[], None]) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops() / len(batch[0]) / 1e6

    return {
        "published": counted(lambda: [published(learner, batch) for learner in setting.separate]),
        "separate": counted(lambda: [learner.step(batch) for learner in setting.separate]),
        "joint": counted(lambda: setting.joint.step(batch)),
    }


def published(learner: Learner, batch: Batch) -> None:
    """Forward and backward of one pair as arXiv 2402.16918 has them."""
    task = learner.task
    (index,) = task.indices
    (teacher,), (student,) = task.teachers.values(), task.trainable_module.values()
    suffix = nn.Sequential(*task.meta[index + 1 :])
    with torch.no_grad():
        prefix = nn.Sequential(*task.meta[:index])(batch[0])
        teacher_logits = suffix(teacher(prefix))
    logits = suffix(student(prefix))
    distillation_loss(logits, teacher_logits, batch[1], task.settings).backward()


def main() -> None:
    """Measures every recipe and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="built-in names or YAML files")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    parser.add_argument("--count", action="store_true", help="count FLOPs instead of timing")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.count and status()["kernels"]:
        parser.error("--count needs the references; set M2MKD_NO_EXTENSION=1")
    torch.set_num_threads(args.threads)
    for name in args.recipes:
        setting = prepare(load_recipe(name, tuple(args.overrides)))
        facts = {"recipe": name, "pairs": len(setting.separate), "on": machine("cpu")}
        results: dict[str, Any] = (
            {"MFLOP an image": count_forms(setting)}
            if args.count
            else {
                f"{args.steps} steps, {kind} loading": time_forms(setting, args, kind == "with")
                for kind in ("with", "without")
            }
        )
        print(json.dumps({**facts, **results}, indent=1))


if __name__ == "__main__":
    main()
