"""Which stages a run has, where each lives, and what determines its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd.recipe import DataConfig, Recipe, Schedule, digest

STAGES = ("meta", "teacher", "distill", "end_to_end", "baselines", "evaluate")


@dataclass(frozen=True)
class StagePlan:
    """One unit of training.

    Attributes:
        stage: Which of `STAGES` it belongs to.
        name: Its folder inside the run folder.
        digest: Hash of every setting that determines its result, those of earlier stages included.
        schedule: How it trains; None when it only evaluates.
        setting: Recipe key of the schedule.
    """

    stage: str
    name: str
    digest: str
    schedule: Schedule | None
    setting: str


@dataclass(frozen=True)
class Facts:
    """What determines results besides the recipe.

    Attributes:
        data: Names of the classes and numbers of images, as JSON-able values.
        end_to_end_data: The same of the recipe's `end_to_end_data`; None when there is none.
        teacher_depths: Blocks per teacher module.
        student_depths: Blocks per student module.
        teacher_weights: Hash of the given weights file; None when there is none.
        student_weights: The same of the dense ViT that the student starts as.
    """

    data: list[Any]
    teacher_depths: list[int]
    student_depths: list[int]
    teacher_weights: str | None
    student_weights: str | None = None
    end_to_end_data: list[Any] | None = None


def plan_run(recipe: Recipe, facts: Facts) -> dict[str, StagePlan]:
    """Lists the stages of a recipe, in order, by folder name.

    What does not change results is left out of the digests, so that changing it repeats nothing:
    where the data and the weights file lie, workers, what an unreadable image does (a complete
    stage met none, or left them out), whether pairs are trained together, and what trades memory
    for time: gradient checkpointing, compiling, sharding, and how a step's images are cut into
    batches. (With mixing, drop path or router noise other random numbers are drawn; one result is
    as good as the other.) The number of processes is no setting: a checkpoint remembers how many
    images its steps took, and any number goes on in such steps.
    """
    base = _base(recipe, recipe.data, facts.data)
    teacher, distill = recipe.teacher, recipe.distill
    student = _dump(recipe.student, exclude={"depths", "upcycle_from"})
    if facts.student_weights is not None:
        student["upcycled"] = facts.student_weights
    fresh_teacher = (teacher.model, teacher.model_args, facts.teacher_depths)
    count = len(facts.teacher_depths)
    meta = digest(base, "meta", _dump(recipe.meta), teacher.model, teacher.model_args, count)
    weights = teacher.pretrained, facts.teacher_weights
    schedules = _dump(
        teacher, exclude={"model", "model_args", "depths", "pretrained", "checkpoint", "align"}
    )
    # Alignment takes the place of labels, unless modules are incubated in the meta model first.
    learns_labels = not teacher.is_aligned or teacher.incubate is not None
    taught = digest(meta if learns_labels else base, "teacher", fresh_teacher, weights, schedules)
    aligned = digest(taught, "alignment", _dump(recipe.meta))
    pairs = digest(
        aligned if teacher.is_aligned else taught,
        student,
        facts.student_depths,
        _dump(distill, exclude={"mode", "assembly", "grid", "classifier"}),
    )
    student_base, moved = base, []
    if recipe.end_to_end_data is not None:
        student_base = _base(recipe, recipe.end_to_end_data, facts.end_to_end_data)
        moved = [student_base, distill.grid, distill.classifier]
    final = digest(pairs, distill.assembly, _dump(recipe.end_to_end), *moved)
    alone = digest(student_base, student, _dump(recipe.end_to_end))

    stages = [StagePlan("meta", "meta", meta, recipe.meta, "meta")] if learns_labels else []
    if teacher.incubate is not None:
        stages.append(
            StagePlan(
                "teacher",
                "incubation",
                digest(meta, "incubation", fresh_teacher, schedules["incubate"]),
                teacher.incubate,
                "teacher.incubate",
            )
        )
    longer = recipe.end_to_end.model_copy(
        update={"epochs": recipe.end_to_end.epochs + distill.schedule.epochs}
    )
    baselines = {
        "end_to_end_only": (alone, recipe.end_to_end),
        "equal_updates": (digest(alone, _dump(longer)), longer),
        "logit_kd": (
            digest(taught, alone, _dump(recipe.logit_kd)),
            recipe.end_to_end,
        ),
    }
    stages.append(StagePlan("teacher", "teacher", taught, teacher.finetune, "teacher.finetune"))
    if teacher.is_aligned:
        stages.append(StagePlan("teacher", "alignment", aligned, recipe.meta, "meta"))
    stages += [
        StagePlan("distill", "distill", pairs, distill.schedule, "distill.schedule"),
        StagePlan("end_to_end", "end_to_end", final, recipe.end_to_end, "end_to_end"),
    ]
    for name in recipe.baselines:
        key, schedule = baselines[name]
        stages.append(StagePlan("baselines", f"baselines/{name}", key, schedule, "end_to_end"))
    return {stage.name: stage for stage in stages}


def stage_folders(out: Path, plan: StagePlan, num_modules: int) -> list[Path]:
    """Folders whose `DONE` files say that the stage is complete."""
    if plan.stage == "distill":
        return [out / plan.name / f"pair-{i:02d}" for i in range(num_modules)]
    return [out / plan.name]


def _base(recipe: Recipe, data: DataConfig, facts: list[Any] | None) -> str:
    """What every stage on these data depends on."""
    ignored = {"root", "workers", "eval_batch_size", "on_bad_image", "batch_size", "accumulate"}
    values = data.model_dump(mode="json", exclude=ignored)
    values["step"] = data.batch_size * data.accumulate
    return digest(recipe.seed, recipe.precision, recipe.lr_base_size, values, facts)


def _dump(section: Any, exclude: set[str] | None = None) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json", exclude=exclude)
    return values
