"""Runs the stages of a recipe in a run folder, skipping what is done and resuming what is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from m2mkd.distill import (
    LogitKDTask,
    PairLossSettings,
    PairsTask,
    SupervisedTask,
    assemble,
    pair_name,
)
from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models import NAC, split_vit
from m2mkd.models.checkpoint import (
    ModelCard,
    load_model,
    newest_checkpoint,
    read_checkpoint,
    read_json,
    sha256,
    weights_file,
    write_checkpoint,
    write_text,
)
from m2mkd.nn.circuit_statistics import circuit_statistics
from m2mkd.recipe import Recipe
from m2mkd.train.data import ImageData
from m2mkd.train.evaluate import Evaluation, evaluate_model
from m2mkd.train.loop import Context, Job, check_schedule, fit, read_done, read_metrics
from m2mkd.train.networks import Networks, versions
from m2mkd.train.plan import STAGES, Facts, StagePlan, plan_run, stage_folders
from m2mkd.train.progress import Reporter
from m2mkd.train.tracking import Tracking, check_trackers


class Run:
    """A recipe in its run folder.

    Args:
        recipe: What to do.
        out: The run folder; made when missing.
        reporter: Where progress goes.

    Raises:
        ConfigError: A recipe whose parts do not fit each other.
        DataError: Data that is not there.
    """

    def __init__(self, recipe: Recipe, out: Path, reporter: Reporter) -> None:
        self.recipe = recipe
        self.out = out
        self.reporter = reporter
        self.data = ImageData(recipe.data, recipe.seed)
        self.networks = Networks(recipe, self.data)
        self.plan = plan_run(recipe, self._facts())
        for plan in self.plan.values():
            if plan.schedule is not None:
                check_schedule(plan.schedule, plan.setting)
        check_trackers(recipe.tracking)
        self.device: torch.device = make_accelerator(recipe).device

    def _facts(self) -> Facts:
        file = self.recipe.teacher.checkpoint
        dense = self.recipe.student.upcycle_from
        return Facts(
            data=[self.data.class_names, len(self.data.train), len(self.data.validation)],
            teacher_depths=self.networks.teacher_depths,
            student_depths=self.networks.student_depths,
            teacher_weights=None if file is None else sha256(file),
            student_weights=None if dense is None else sha256(weights_file(dense)),
        )

    def prepare_folder(self, pair: int | None = None) -> None:
        """Writes the resolved recipe; earlier stages of other settings are set aside, not lost.

        Args:
            pair: Look at this pair's folder only: others may be written by other jobs right now.
        """
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        facts = ", ".join(f"{name} {version}" for name, version in versions().items())
        write_text(self.out / "recipe.yaml", f"# resolved by {facts}\n{text}")
        for plan in self.plan.values():
            folders = self._owned_folders(plan)
            if pair is not None:
                folders = [self._pair_folder(pair)] if plan.stage == "distill" else []
            for folder in folders:
                found = _digest_of(folder)
                if found not in (None, plan.digest):
                    self.set_aside(folder, "its settings changed")

    def set_aside(self, folder: Path, reason: str) -> None:
        """Moves a stage's folder to `superseded/`, so that it is done anew."""
        if not folder.exists():
            return
        name = str(folder.relative_to(self.out)).replace("/", "-")
        number = 0
        while (target := self.out / "superseded" / f"{name}-{number}").exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
        self.reporter.message(f"{name}: {reason}; the earlier result is now in {target}")

    def is_done(self, name: str) -> bool:
        """Whether a unit of the plan is complete."""
        plan = self.plan[name]
        folders = stage_folders(self.out, plan, self.networks.num_modules)
        return all(read_done(folder, plan.digest) is not None for folder in folders)

    def train_meta(self) -> None:
        """Trains the meta model end to end on labels (Deep Incubation's PT)."""
        model = self.networks.meta()
        self._supervise("meta", model, self.networks.card("meta"))

    def train_teacher(self) -> None:
        """Incubates a fresh teacher, or takes the given one; then fine-tunes it."""
        if "incubation" in self.plan and not self.is_done("incubation"):
            self._incubate()
        schedule = self.recipe.teacher.finetune
        teacher = self.networks.teacher(schedule.drop_path if schedule else 0.0)
        if "incubation" in self.plan:
            weights = read_checkpoint(_last(self.out / "incubation")).weights
            modules = [_of_pair(weights, i) for i in range(self.networks.num_modules)]
            assemble(teacher, self.networks.teacher_depths, modules)
        card = self.networks.card("teacher")
        if schedule is not None:
            self._record_start("teacher", teacher, {})
            self._supervise("teacher", teacher, card)
        else:
            self._store("teacher", teacher, card)

    def train_pairs(self, pair: int | None = None) -> None:
        """m2mKD: trains student modules inside the meta model, next to the teacher's.

        Args:
            pair: Only this one, for one job per pair; None trains all that are not done.
        """
        indices = list(range(self.networks.num_modules)) if pair is None else [pair]
        if pair is not None and not 0 <= pair < self.networks.num_modules:
            raise ConfigError(
                f"--pair {pair} does not exist: this recipe has {self.networks.num_modules} "
                f"modules, 0 to {self.networks.num_modules - 1}"
            )
        plan = self.plan["distill"]
        open_pairs = [i for i in indices if read_done(self._pair_folder(i), plan.digest) is None]
        if not open_pairs:
            return
        # Pairs that were begun alone are finished alone: a joint pass would train them again.
        is_joint = self.recipe.distill.mode == "joint" and pair is None
        if is_joint and not any(self._was_begun_alone(i) for i in indices):
            self._fit_pairs(indices, self.out / "distill" / "joint")
            self._split_joint(plan)
            return
        for i in open_pairs:
            self._fit_pairs([i], self._pair_folder(i))

    def train_end_to_end(self) -> None:
        """Assembles the student from its trained modules and trains it on labels."""
        assembly = self.recipe.distill.assembly
        student = self.networks.student(assembly)
        report = self.networks.assemble(student, self._pair_weights())
        self._record_start("end_to_end", student, asdict(report))
        self._supervise("end_to_end", student, self.networks.card("student", assembly))

    def train_baselines(self) -> None:
        """Trains what m2mKD is compared with, from the same initial weights."""
        for name in self.recipe.baselines:
            if self.is_done(f"baselines/{name}"):
                continue
            student = self.networks.student()
            card = self.networks.card("student")
            if name != "logit_kd":
                self._supervise(f"baselines/{name}", student, card)
                continue
            settings = PairLossSettings(
                alpha=self.recipe.logit_kd.alpha, temperature=self.recipe.logit_kd.temperature
            )
            teacher = self.load("teacher")
            task = LogitKDTask(student, teacher, settings)
            self._fit_network(f"baselines/{name}", task, student, card)

    def load(self, name: str) -> Any:
        """Loads the trained network of a stage, on the run's device."""
        model, _ = load_model(self.out / name)
        return model.to(self.device)

    def pair_modules(self) -> list[nn.Module]:
        """The distilled student modules, with their stitches, on the run's device."""
        stages = self.networks.student_modules()
        for stage, weights in zip(stages, self._pair_weights(), strict=True):
            stage.load_state_dict(weights)
        return list(stages.to(self.device).eval())

    def _incubate(self) -> None:
        schedule = self.plan["incubation"].schedule
        teacher = self.networks.teacher(schedule.drop_path if schedule else 0.0)
        stages = split_vit(teacher, self.networks.teacher_depths)
        task = PairsTask(self._meta_stages(), dict(enumerate(stages)), {})
        self._fit("incubation", task, self.out / "incubation")

    def _fit_pairs(self, indices: list[int], folder: Path) -> None:
        student = self.networks.student_modules()
        teacher = split_vit(self.load("teacher"), self.networks.teacher_depths)
        distill = self.recipe.distill
        settings = PairLossSettings(
            alpha=distill.alpha,
            temperature=distill.temperature,
            kd=distill.kd,
            kd_reduction=distill.kd_reduction,
            boundary_weight=distill.boundary_weight,
        )
        task = PairsTask(
            self._meta_stages(),
            {i: student[i] for i in indices},
            {i: teacher[i] for i in indices},
            settings,
        )
        self._fit("distill", task, folder)

    def _split_joint(self, plan: StagePlan) -> None:
        """Gives every pair its own folder, as if it had been trained alone."""
        joint, _ = newest_checkpoint(self.out / "distill" / "joint")
        if joint is None:
            raise CheckpointError(f"{self.out / 'distill' / 'joint'} holds no checkpoint")
        for i in range(self.networks.num_modules):
            name = pair_name(i)
            weights = {k: v for k, v in joint.weights.items() if k.startswith(f"{name}.")}
            folder = self._pair_folder(i)
            step = joint.meta["step"]
            meta = {"stage": f"distill/{name}", "digest": plan.digest, "trained": "joint"}
            write_checkpoint(folder, step, weights, meta=meta)
            write_text(folder / "metrics.jsonl", _metrics_of_pair(self.out / "distill/joint", name))
            done = {"digest": plan.digest, "steps": step, "trained": "joint"}
            write_text(folder / "DONE", json.dumps(done, indent=1))

    def _meta_stages(self) -> list[nn.Module]:
        return list(split_vit(self.load("meta"), [1] * self.networks.num_modules))

    def _pair_weights(self) -> list[dict[str, Tensor]]:
        """Trained weights of every student module, under the module's own names."""
        return [
            _of_pair(read_checkpoint(_last(self._pair_folder(i))).weights, i)
            for i in range(self.networks.num_modules)
        ]

    def _was_begun_alone(self, index: int) -> bool:
        checkpoint, _ = newest_checkpoint(self._pair_folder(index))
        return checkpoint is not None and checkpoint.meta.get("trained") != "joint"

    def _pair_folder(self, index: int) -> Path:
        return self.out / "distill" / pair_name(index)

    def _owned_folders(self, plan: StagePlan) -> list[Path]:
        folders = stage_folders(self.out, plan, self.networks.num_modules)
        return [*folders, self.out / "distill" / "joint"] if plan.stage == "distill" else folders

    def _supervise(self, name: str, model: nn.Module, card: ModelCard) -> None:
        self._fit_network(name, SupervisedTask(model), model, card)

    def _fit_network(self, name: str, task: Any, model: nn.Module, card: ModelCard) -> None:
        self._fit(
            name,
            task,
            self.out / name,
            evaluate=lambda: self._grade(model),
            meta={"card": asdict(card)},
        )

    def _grade(self, model: nn.Module) -> dict[str, Any]:
        """What is known of a network after an epoch: its accuracy, and a NAC's circuit."""
        numbers: dict[str, Any] = asdict(self.evaluate(model))
        if isinstance(model, NAC):
            numbers["circuit"] = circuit_statistics(model.circuit(0))
        return numbers

    def _fit(
        self,
        name: str,
        task: Any,
        folder: Path,
        *,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        plan = self.plan[name]
        if plan.schedule is None:
            raise ConfigError(f"{name} has no schedule to train with")
        job = Job(
            name=str(folder.relative_to(self.out)),
            stage=name,
            task=task,
            schedule=plan.schedule,
            folder=folder,
            digest=plan.digest,
            evaluate=evaluate,
            meta=meta or {},
            setting=plan.setting,
        )
        context = Context(
            # A new one for every job: accelerate keeps optimisers and loss scale of earlier ones.
            accelerator=make_accelerator(self.recipe),
            data=self.data,
            augment=self.recipe.data.augment,
            seed=self.recipe.seed,
            reporter=self.reporter,
            checkpoint_every=self.recipe.checkpoint_every,
        )
        with Tracking(self.recipe, self.out, job.name) as tracking:
            fit(job, replace(context, track=tracking.log))

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Grades a network on the validation images."""
        return evaluate_model(model, self.data.validation_batches(), self.device)

    def _store(self, name: str, model: nn.Module, card: ModelCard) -> None:
        """Keeps a network that needs no training as a complete stage."""
        plan = self.plan[name]
        meta = {"card": asdict(card), "stage": name, "digest": plan.digest}
        write_checkpoint(self.out / name, 0, model.state_dict(), meta=meta)
        done = {"digest": plan.digest, "steps": 0}
        write_text(self.out / name / "DONE", json.dumps(done, indent=1))

    def _record_start(self, name: str, model: nn.Module, facts: dict[str, Any]) -> None:
        """Measures an assembled network before it is trained end to end, once."""
        path = self.out / name / "assembly.json"
        digest = self.plan[name].digest
        if path.is_file() and read_json(path).get("digest") == digest:
            return
        accuracy = asdict(self.evaluate(model.to(self.device)))
        facts = {"digest": digest, "accuracy": accuracy, **facts}
        write_text(path, json.dumps(facts, indent=1))
        self.reporter.message(f"{name}: {accuracy['top1']:.2f} % top-1 before end-to-end training")


def train(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    stage: str | None = None,
    from_stage: str | None = None,
    pair: int | None = None,
    fresh: bool = False,
) -> dict[str, Any] | None:
    """Runs a recipe: all stages that are not complete, or one of them.

    Args:
        recipe: What to do.
        out: The run folder.
        reporter: Where progress goes.
        stage: Only this one of `STAGES`; earlier ones must be complete.
        from_stage: Redo this stage and all after it.
        pair: With stage `distill`: only this pair.
        fresh: Set all earlier results of the folder aside first.

    Returns:
        The summary (as in `summary.json`), or None when the evaluate stage was not run.

    Raises:
        M2MKDError: Anything a user can cause; what was computed stays.
        KeyboardInterrupt: Stopped on request, after saving.
    """
    from m2mkd.train.summary import summarise

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run = Run(recipe, out, reporter)
    run.prepare_folder(pair)
    redone = STAGES if fresh else STAGES[STAGES.index(from_stage) :] if from_stage else ()
    for plan in run.plan.values():
        if plan.stage in redone:
            run.set_aside(out / plan.name, "asked to start over")
    steps: dict[str, Callable[[], Any]] = {
        "meta": run.train_meta,
        "teacher": run.train_teacher,
        "distill": lambda: run.train_pairs(pair),
        "end_to_end": run.train_end_to_end,
        "baselines": run.train_baselines,
    }
    for name in STAGES[:-1] if stage is None else [stage]:
        units = [unit.name for unit in run.plan.values() if unit.stage == name]
        if name == "evaluate":
            break
        if all(run.is_done(unit) for unit in units):
            if units:
                reporter.message(f"{name}: complete")
            continue
        _require_earlier(run, name)
        steps[name]()
    if stage not in (None, "evaluate"):
        return None
    _require_earlier(run, "evaluate")
    return summarise(run)


def _require_earlier(run: Run, stage: str) -> None:
    needed = {
        "teacher": ["meta"],
        "distill": ["meta", "teacher"],
        "end_to_end": ["distill"],
        "baselines": ["teacher"] if "logit_kd" in run.recipe.baselines else [],
        "evaluate": list(run.plan),
    }
    for name in needed.get(stage, []):
        if not run.is_done(name):
            raise CheckpointError(
                f"stage {stage} needs {name}, which is not complete in {run.out}; "
                "run it first, or leave out --stage"
            )


def make_accelerator(recipe: Recipe) -> Accelerator:
    """What places and scales the training of one job; of one process, in the recipe's precision.

    Raises:
        ConfigError: A precision the device cannot do, or several processes.
    """
    # accelerate keeps the first precision of a process; a second run may ask for another.
    AcceleratorState._reset_state(reset_partial_state=False)
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.precision]
    try:
        accelerator = Accelerator(mixed_precision=mixed)
    except ValueError as error:
        raise ConfigError(f"precision {recipe.precision}: {error}; set precision: fp32") from None
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; set precision: bf16 or fp32")
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"started as {accelerator.num_processes} processes, but training runs in one; start "
            "it without torchrun, and one job per pair with --stage distill --pair N"
        )
    return accelerator


def _digest_of(folder: Path) -> str | None:
    """Digest that a stage folder was made for, or None when there is nothing in it."""
    done = folder / "DONE"
    if done.is_file():
        return str(read_json(done).get("digest"))
    checkpoint, _ = newest_checkpoint(folder)
    return None if checkpoint is None else str(checkpoint.meta.get("digest"))


def _last(folder: Path) -> Path:
    pointer = folder / "last"
    if not pointer.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint; run that stage first")
    return folder / pointer.read_text().strip()


def _of_pair(weights: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Weights of one module under its own names (`pair-00.blocks...` -> `blocks...`)."""
    prefix = f"{pair_name(index)}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _metrics_of_pair(joint: Path, name: str) -> str:
    """Lines of a joint metrics.jsonl with one pair's loss and accuracy, as if trained alone."""
    kept = []
    for line in read_metrics(joint):
        own = {k: v for k, v in line.items() if k in ("step", "epoch", "lr")}
        own |= {k: v for k, v in line.items() if k.startswith(name)}
        kept.append(json.dumps({**own, "loss": line[f"{name}/loss"]}) + "\n")
    return "".join(kept)
