"""What every stage of a recipe does, and what it leaves in the run folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
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
    newest_meta,
    read_checkpoint,
    read_json,
    sha256,
    weights_file,
    write_checkpoint,
    write_text,
)
from m2mkd.nn.circuit_statistics import circuit_statistics
from m2mkd.recipe import Recipe
from m2mkd.train import alignment
from m2mkd.train.claim import Claim, check_free
from m2mkd.train.data import ImageData
from m2mkd.train.evaluate import Evaluation, evaluate_model, evaluate_together
from m2mkd.train.failures import failures_named
from m2mkd.train.folder import (
    digest_of,
    holds_facts,
    last_checkpoint,
    metrics_of_pair,
    weights_of_pair,
)
from m2mkd.train.loop import Context, Job, check_schedule, fit, read_done
from m2mkd.train.networks import Networks, versions
from m2mkd.train.parallel import check_parallel
from m2mkd.train.plan import Facts, StagePlan, plan_run, stage_folders
from m2mkd.train.progress import Reporter
from m2mkd.train.stopping import StopRequest
from m2mkd.train.tracking import Tracking, check_trackers
from m2mkd.train.world import World, make_accelerator


class Run:
    """A recipe in its run folder.

    Args:
        recipe: What to do.
        out: The run folder; made when missing.
        reporter: Where progress goes.
        stop: Asks for a checkpoint and an end.

    Raises:
        ConfigError: A recipe whose parts do not fit each other.
        DataError: Data that is not there.
    """

    def __init__(
        self, recipe: Recipe, out: Path, reporter: Reporter, stop: StopRequest | None = None
    ) -> None:
        self.recipe = recipe
        self.out = out
        self.reporter = reporter
        self.stop = stop or StopRequest()
        self.claim: Claim | None = None
        self.waiting_for = ""
        accelerator = make_accelerator(recipe)
        self.device: torch.device = accelerator.device
        self.world = World(accelerator.process_index, accelerator.num_processes, self.device)
        self.data = ImageData(recipe.data, recipe.seed, self.world)
        self._own_data: ImageData | None = None  # of the whole student
        if recipe.end_to_end_data is not None:
            self._own_data = ImageData(
                recipe.end_to_end_data, recipe.seed, self.world, key="end_to_end_data"
            )
        self.networks = Networks(recipe, self.data, self._own_data)
        self.plan = plan_run(recipe, self._facts())
        for plan in self.plan.values():
            if plan.schedule is not None:
                check_schedule(plan.schedule, plan.setting, recipe.parallel)
        check_trackers(recipe.tracking)
        if recipe.parallel != "ddp":
            check_parallel(recipe, self.networks.student(), self.world)

    def _facts(self) -> Facts:
        file = self.networks.teacher_file
        dense = self.recipe.student.upcycle_from
        return Facts(
            data=_facts_of(self.data),
            end_to_end_data=None if self._own_data is None else _facts_of(self._own_data),
            teacher_depths=self.networks.teacher_depths,
            student_depths=self.networks.student_depths,
            teacher_weights=None if file is None else sha256(file),
            student_weights=None if dense is None else sha256(weights_file(dense)),
        )

    def data_of(self, stage: str) -> ImageData:
        """The images that a stage or unit of the plan trains on, and is graded on."""
        if self._own_data is None or self.recipe.data_key(stage) == self.data.key:
            return self.data
        return self._own_data

    def prepare_folder(self, pair: int | None = None) -> None:
        """Writes the resolved recipe; earlier stages of other settings are set aside, not lost.

        Args:
            pair: Touch this pair's folder only: others may be written by other jobs right now.
        """
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        facts = ", ".join(f"{name} {version}" for name, version in versions().items())
        if pair is None:
            write_text(self.out / "recipe.yaml", f"# resolved by {facts}\n{text}")
        for plan in self.plan.values():
            folders = self._owned_folders(plan)
            if pair is not None:
                folders = [self._pair_folder(pair)] if plan.stage == "distill" else []
            for folder in folders:
                found = digest_of(folder)
                if found not in (None, plan.digest):
                    self.set_aside(folder, "its settings changed")
                elif (folder / "DONE").is_file():
                    self._reopen_if_damaged(folder)

    def _reopen_if_damaged(self, folder: Path) -> None:
        """Lets a complete stage whose last checkpoint was damaged go on from an earlier one."""
        try:
            read_checkpoint(last_checkpoint(folder))
            if folder.name == "end_to_end":
                read_json(folder / "assembly.json")
            elif folder.name == alignment.NAME:
                alignment.hybrids_before(self)
        except CheckpointError as error:
            joint = self.out / "distill" / "joint"
            if folder.parent == joint.parent and folder != joint and joint.is_dir():
                self.set_aside(folder, str(error))  # its weights are in the joint checkpoint too
            else:
                (folder / "DONE").unlink()

    def set_aside(self, folder: Path, reason: str) -> None:
        """Moves a stage's folder to `superseded/`, so that it is done anew.

        Raises:
            BusyError: Another job is writing to it.
        """
        if not folder.exists():
            return
        check_free(folder, self.reporter.message)
        name = str(folder.relative_to(self.out)).replace("/", "-")
        number = 0
        while (target := self.out / "superseded" / f"{name}-{number}").exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
        (self.out / "summary.json").unlink(missing_ok=True)
        self.reporter.message(f"{name}: {reason}; the earlier result is now in {target}")

    def is_done(self, name: str) -> bool:
        """Whether a unit of the plan is complete; asks the file system of this process."""
        plan = self.plan[name]
        folders = stage_folders(self.out, plan, self.networks.num_modules)
        return all(read_done(folder, plan.digest) is not None for folder in folders)

    def _needs(self, name: str) -> bool:
        """Whether a unit is still to do; the same answer in every process."""
        return self.world.on_main(lambda: not self.is_done(name))

    @contextmanager
    def _holding(self, *folders: Path, alone: tuple[Path, ...] = ()) -> Iterator[None]:
        """Keeps other jobs from writing to folders; `alone` must not be held by another either.

        Raises:
            BusyError: Another job is writing to one of them.
        """
        with ExitStack() as held:

            def claim() -> None:
                for folder in folders:
                    self.claim = held.enter_context(Claim(folder, self.reporter.message))
                for folder in alone:
                    check_free(folder, self.reporter.message)

            self.world.on_main(claim)
            try:
                yield
            finally:
                self.claim = None

    def train_meta(self) -> None:
        """Trains the meta model end to end on labels (Deep Incubation's PT)."""
        model = self.networks.meta()
        with self._holding(self.out / "meta"):
            self._supervise("meta", model, self.networks.card("meta"))

    def train_teacher(self) -> None:
        """Makes the teacher; then, if it is so planned, the meta model learns from it."""
        if self._needs("teacher"):
            self._make_teacher()
        if alignment.NAME in self.plan and self._needs(alignment.NAME):
            with self._holding(self.out / alignment.NAME):
                alignment.align(self)

    def _make_teacher(self) -> None:
        """Incubates a fresh teacher, or takes the given one; then fine-tunes it."""
        if "incubation" in self.plan and self._needs("incubation"):
            with self._holding(self.out / "incubation"):
                self._incubate()
        schedule = self.recipe.teacher.finetune
        teacher = self.networks.teacher(schedule.drop_path if schedule else 0.0)
        if "incubation" in self.plan:
            weights = read_checkpoint(last_checkpoint(self.out / "incubation")).weights
            modules = [weights_of_pair(weights, i) for i in range(self.networks.num_modules)]
            assemble(teacher, self.networks.teacher_depths, modules)
        card = self.networks.card("teacher")
        with self._holding(self.out / "teacher"):
            if schedule is not None:
                self._record_start("teacher", teacher, {})
                self._supervise("teacher", teacher, card)
            else:
                self.world.on_main(lambda: self._store("teacher", teacher, card))

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
        joint = self.out / "distill" / "joint"

        def look() -> tuple[list[int], bool]:
            todo = [i for i in indices if read_done(self._pair_folder(i), plan.digest) is None]
            return todo, any(self._was_begun_alone(i) for i in indices)

        open_pairs, begun_alone = self.world.on_main(look)
        if not open_pairs:
            return
        # Pairs that were begun alone are finished alone: a joint pass would train them again.
        if self.recipe.distill.mode == "joint" and pair is None and not begun_alone:
            pairs = tuple(self._pair_folder(i) for i in indices)
            with self._holding(joint, alone=pairs):
                self._fit_pairs(indices, joint)
                self.world.on_main(lambda: self._split_joint(plan))
            return
        for i in open_pairs:
            with self._holding(self._pair_folder(i), alone=(joint,)):
                self._fit_pairs([i], self._pair_folder(i))

    def train_end_to_end(self) -> None:
        """Assembles the student from its trained modules and trains it on labels."""
        assembly = self.recipe.distill.assembly
        student = self.networks.student(assembly)
        report = self.networks.assemble(student, self._pair_weights())
        with self._holding(self.out / "end_to_end"):
            facts = asdict(report)
            if self._own_data is not None:
                choices = self.recipe.distill
                facts |= {"grid": choices.grid, "classifier": choices.classifier}
            self._record_start("end_to_end", student, facts)
            self._supervise("end_to_end", student, self.networks.card("student", assembly))

    def train_baselines(self) -> None:
        """Trains what m2mKD is compared with, from the same initial weights."""
        for name in self.recipe.baselines:
            if self._needs(f"baselines/{name}"):
                with self._holding(self.out / "baselines" / name):
                    self._train_baseline(name)

    def _train_baseline(self, name: str) -> None:
        student = self.networks.student()
        card = self.networks.card("student")
        if name != "logit_kd":
            self._supervise(f"baselines/{name}", student, card)
            return
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
        meta = split_vit(self.load("meta"), [1] * self.networks.num_modules)
        task = PairsTask(list(meta), dict(enumerate(stages)), {})
        self.fit("incubation", task, self.out / "incubation")

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
        self.fit("distill", task, folder)

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
            write_text(folder / "metrics.jsonl", metrics_of_pair(self.out / "distill/joint", name))
            done = {"digest": plan.digest, "steps": step, "trained": "joint"}
            write_text(folder / "DONE", json.dumps(done, indent=1))

    def _meta_stages(self) -> list[nn.Module]:
        return list(split_vit(alignment.hosting_meta(self), [1] * self.networks.num_modules))

    def _pair_weights(self) -> list[dict[str, Tensor]]:
        """Trained weights of every student module, under the module's own names."""
        return [
            weights_of_pair(read_checkpoint(last_checkpoint(self._pair_folder(i))).weights, i)
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
        self.fit(
            name,
            task,
            self.out / name,
            evaluate=lambda: self.grade(model, self.data_of(name)),
            meta={"card": asdict(card)},
        )

    def grade(self, model: nn.Module, data: ImageData) -> dict[str, Any]:
        """What is known of a network after an epoch: its accuracy, and a NAC's circuit."""
        numbers: dict[str, Any] = asdict(self.evaluate_together(model, data))
        if isinstance(model, NAC):
            numbers["circuit"] = circuit_statistics(model.circuit(0))
        return numbers

    def fit(
        self,
        name: str,
        task: Any,
        folder: Path,
        *,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        """Trains a unit of the plan to its end; `meta` are facts for its checkpoints."""
        plan = self.plan[name]
        if plan.schedule is None:
            raise ConfigError(f"{name} has no schedule to train with")
        data = self._data_as_begun(self.data_of(name), folder)
        scale = 1.0
        if self.recipe.lr_base_size is not None:
            scale = data.images_per_step / self.recipe.lr_base_size
        job = Job(
            name=str(folder.relative_to(self.out)),
            stage=name,
            task=task,
            schedule=plan.schedule.model_copy(update={"lr": plan.schedule.lr * scale}),
            folder=folder,
            digest=plan.digest,
            evaluate=evaluate,
            meta=meta or {},
            setting=plan.setting,
        )
        context = Context(
            # A new one for every job: accelerate keeps optimisers and loss scale of earlier ones.
            accelerator=make_accelerator(self.recipe),
            data=data,
            augment=self.recipe.data_of(name).augment,
            seed=self.recipe.seed,
            reporter=self.reporter,
            world=self.world,
            stop=self.stop,
            guard=self.claim.check if self.claim is not None else None,
            checkpoint_every=self.recipe.checkpoint_every,
            parallel=self.recipe.parallel,
            is_compiled=self.recipe.compile,
            is_recomputed=self.recipe.grad_checkpointing,
        )
        with (
            failures_named(f"stage {job.name}", self.recipe, is_training=True, key=data.key),
            Tracking(self.recipe, self.out, job.name, self.reporter.message) as tracking,
        ):
            fit(job, replace(context, track=tracking.log))

    def _data_as_begun(self, data: ImageData, folder: Path) -> ImageData:
        """Data in the steps of the job that began a stage: it may have had other processes."""
        begun = self.world.on_main(lambda: newest_meta(folder).get("images_per_step"))
        if begun in (None, data.images_per_step):
            return data
        data = data.in_steps_of(begun)
        now = f"{data.key}.accumulate {data.accumulate}, {data.key}.batch_size {data.batch_size}"
        self.reporter.message(f"{folder.name}: goes on in steps of {begun} images, with {now}")
        return data

    def evaluate(self, model: nn.Module, data: ImageData) -> Evaluation:
        """Grades a network on the validation images of `data`, in this process alone."""
        with failures_named("evaluation", self.recipe, is_training=False, key=data.key):
            return evaluate_model(model, data.validation_batches(), self.device)

    def evaluate_together(self, model: nn.Module, data: ImageData) -> Evaluation:
        """Grades a network on the validation images of `data`, dealt out to all processes."""
        batches = data.own_validation_batches()
        with failures_named("evaluation", self.recipe, is_training=False, key=data.key):
            return evaluate_together(model, batches, self.world, data.preprocessing["input_size"])

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
        if self.world.on_main(lambda: holds_facts(path, digest)):
            return
        accuracy = asdict(self.evaluate_together(model.to(self.device), self.data_of(name)))
        facts = {"digest": digest, "accuracy": accuracy, **facts}
        self.world.on_main(lambda: write_text(path, json.dumps(facts, indent=1)))
        self.reporter.message(f"{name}: {accuracy['top1']:.2f} % top-1 before end-to-end training")


def _facts_of(data: ImageData) -> list[Any]:
    return [data.class_names, len(data.train), len(data.validation)]
