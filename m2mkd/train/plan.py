"""Which stages a run has, where each lives, and what determines its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd.recipe import Recipe, Schedule, digest

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


def plan_run(recipe: Recipe) -> dict[str, StagePlan]:
    """Lists the stages of a recipe, in order, by folder name.

    Settings that do not change results (data folder, workers, joint or separate pairs) are left
    out of the digests, so that changing them repeats nothing.
    """
    data = recipe.data.model_dump(mode="json", exclude={"root", "workers", "eval_batch_size"})
    base = digest(recipe.seed, recipe.precision, data)
    teacher, student, distill = recipe.teacher, _dump(recipe.student), recipe.distill
    asked = teacher.depths if teacher.depths != "auto" else recipe.student.depths
    count = asked if asked == "auto" else len(asked)
    meta = digest(base, "meta", _dump(recipe.meta), teacher.model, teacher.model_args, count)
    taught = digest(meta, "teacher", _dump(teacher))
    pairs = digest(taught, student, _dump(distill, exclude={"mode", "assembly"}))
    final = digest(pairs, distill.assembly, _dump(recipe.end_to_end))
    alone = digest(base, student, _dump(recipe.end_to_end))

    stages = [StagePlan("meta", "meta", meta, recipe.meta, "meta")]
    if teacher.incubate is not None:
        stages.append(
            StagePlan(
                "teacher",
                "incubation",
                digest(meta, _dump(teacher, exclude={"finetune"})),
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
    stages += [
        StagePlan("teacher", "teacher", taught, teacher.finetune, "teacher.finetune"),
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


def _dump(section: Any, exclude: set[str] | None = None) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json", exclude=exclude)
    return values
