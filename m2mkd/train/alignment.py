"""A meta model for a teacher that was not incubated in it: it learns from the teacher's modules."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd.distill import AlignTask, Hybrid, assemble
from m2mkd.models import split_vit, start_as_teacher
from m2mkd.models.checkpoint import read_checkpoint, read_json, write_text
from m2mkd.train.folder import holds_facts, last_checkpoint, weights_of_pair

if TYPE_CHECKING:
    from m2mkd.train.run import Run

NAME = "alignment"
_START = "start.json"


def align(run: "Run") -> None:
    """Trains the meta model on the modules of the run's teacher.

    Hybrids are graded before and after, for whoever watches; `start.json` keeps the first.
    """
    teacher = run.load("teacher")
    modules = list(split_vit(teacher, run.networks.teacher_depths))
    meta = run.networks.meta()
    start_as_teacher(meta, teacher, run.networks.teacher_depths)
    stages = _stages(run, meta.to(run.device))
    _record_start(run, stages, modules)
    task = AlignTask(stages, modules)
    run.fit(NAME, task, run.out / NAME, evaluate=lambda: run.grade(meta, run.data))
    after = grade_hybrids(stages, modules, _grader(run))
    run.reporter.message(f"{NAME}: hybrids with one teacher module now {_listed(after)}")


def hosting_meta(run: "Run") -> VisionTransformer:
    """The meta model in which the pairs are taught, as trained, on the run's device."""
    if NAME not in run.plan:
        meta: VisionTransformer = run.load("meta")
        return meta
    meta = run.networks.meta()
    weights = read_checkpoint(last_checkpoint(run.out / NAME)).weights
    count = run.networks.num_modules
    assemble(meta, [1] * count, [weights_of_pair(weights, i) for i in range(count)])
    return meta.to(run.device).eval()


def hybrids_before(run: "Run") -> list[float] | None:
    """Accuracies of the teacher's hybrids before the alignment; None in a run without one."""
    if NAME not in run.plan:
        return None
    found: list[float] = read_json(run.out / NAME / _START)["teacher_hybrids"]
    return found


def grade_hybrids(
    meta: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    evaluate: Callable[[nn.Module], Any],
) -> list[float]:
    """Top-1 in per cent of the meta model with each of the modules in its place."""
    return [round(evaluate(Hybrid(meta, i, module)).top1, 3) for i, module in enumerate(modules)]


def _record_start(run: "Run", stages: list[nn.Module], modules: list[nn.Module]) -> None:
    """Grades the hybrids before any training, once."""
    path = run.out / NAME / _START
    digest = run.plan[NAME].digest
    if run.world.on_main(lambda: holds_facts(path, digest)):
        return
    before = _stages(run, run.load("meta")) if "meta" in run.plan else stages
    top1 = grade_hybrids(before, modules, _grader(run))
    facts = {"digest": digest, "teacher_hybrids": top1}
    run.world.on_main(lambda: write_text(path, json.dumps(facts, indent=1)))
    run.reporter.message(f"{NAME}: hybrids with one teacher module at first {_listed(top1)}")


def _grader(run: "Run") -> Callable[[nn.Module], Any]:
    return lambda hybrid: run.evaluate_together(hybrid, run.data)


def _stages(run: "Run", meta: VisionTransformer) -> list[nn.Module]:
    return list(split_vit(meta, [1] * run.networks.num_modules))


def _listed(top1: list[float]) -> str:
    return f"{', '.join(f'{value:.1f}' for value in top1)} % top-1"
