"""Whole runs: stages, resuming after kills, changed settings, and the errors that stop a run."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SCHEDULE, VALUES, Killed, KillingReporter, metrics, tiny_recipe

from m2mkd.errors import CheckpointError, ConfigError, DataError, M2MKDError, TrainingError
from m2mkd.models import checkpoint as checkpoints
from m2mkd.models.checkpoint import load_model
from m2mkd.train.execute import train
from m2mkd.train.image_set import ImageDataset
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run
from m2mkd.train.stopping import Interrupted


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run and its summary."""
    out = tmp_path_factory.mktemp("reference") / "run"
    summary = train(tiny_recipe(), out, Reporter(quiet=True))
    assert summary is not None
    return out, summary


def assert_same_run(ours: Path, reference: Path) -> None:
    """The same losses in every stage, and bit for bit the same final student."""
    assert metrics(ours) == metrics(reference)
    for stage in ("distill/pair-00", "distill/pair-01", "end_to_end", "baselines/logit_kd"):
        one, other = (
            load_file(run / stage / (run / stage / "last").read_text() / "model.safetensors")
            for run in (ours, reference)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_what_the_design_names(reference: tuple[Path, dict[str, Any]]) -> None:
    out, summary = reference
    for name in ("meta", "teacher", "incubation", "distill/pair-00", "distill/pair-01"):
        assert (out / name / "DONE").is_file() and (out / name / "last").is_file()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["name"] == "tiny"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "</html>" in (out / "report.html").read_text()
    assert len(list((out / "samples").glob("*.png"))) == 10
    accuracy = summary["accuracy"]
    assert set(summary["gain"]) == {"end_to_end_only", "equal_updates", "logit_kd"}
    for name, gain in summary["gain"].items():
        assert gain == pytest.approx(accuracy["m2mkd"] - accuracy[name], abs=1e-3)
    report = json.loads((out / "end_to_end" / "assembly.json").read_text())
    assert report["folded"] == [[0, 1]] and report["untouched"] == []
    model, checkpoint = load_model(out)
    assert checkpoint.card.class_names == [str(i) for i in range(10)]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_complete_run_does_nothing_again(reference: tuple[Path, dict[str, Any]]) -> None:
    out, summary = reference
    reporter = KillingReporter()
    assert train(tiny_recipe(data__workers=0), out, reporter) == summary
    assert reporter.reported == []


# Steps: 5 an epoch, 10 a stage (20 for equal_updates). Moments: before the first checkpoint,
# in mid-epoch, on an epoch's last step before it is saved, and on the last step of all.
MOMENTS = [
    ("meta", 1),
    ("meta", 7),
    ("incubation", 5),
    ("teacher", 3),
    ("distill/joint", 6),
    ("distill/joint", 10),
    ("end_to_end", 2),
    ("end_to_end", 9),
    ("baselines/end_to_end_only", 8),
    ("baselines/equal_updates", 12),
    ("baselines/logit_kd", 10),
]


def test_a_run_killed_in_every_stage_ends_like_an_undisturbed_one(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for moment in MOMENTS:
        with pytest.raises(Killed):
            train(tiny_recipe(), out, KillingReporter(*moment))
    summary = train(tiny_recipe(), out, Reporter(quiet=True))
    assert summary is not None and summary["accuracy"] == reference[1]["accuracy"]
    assert_same_run(out, reference[0])


def test_a_kill_while_a_checkpoint_is_written_loses_only_that_checkpoint(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = checkpoints.sha256
    calls = itertools.count()

    def dying(path: Path) -> str:
        if path.parent.name.endswith(".tmp") and next(calls) == 6:
            raise Killed
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256", dying)
    with pytest.raises(Killed):
        train(tiny_recipe(), out, Reporter(quiet=True))
    assert list(out.rglob(".step_*.tmp"))
    monkeypatch.undo()
    train(tiny_recipe(), out, Reporter(quiet=True))
    assert_same_run(out, reference[0])
    assert not list(out.rglob(".step_*.tmp"))


def test_small_files_that_are_damaged_are_made_anew(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference[0], out)
    (out / "meta" / "last").write_bytes(b"\xff")
    (out / "end_to_end" / "assembly.json").write_text("{")
    summary = train(tiny_recipe(), out, Reporter(quiet=True))
    assert summary is not None and summary["accuracy"] == reference[1]["accuracy"]
    assert_same_run(out, reference[0])
    started = [
        json.loads((run / "end_to_end/assembly.json").read_text()) for run in (out, reference[0])
    ]
    assert started[0] == started[1]


def test_an_evaluation_that_fails_costs_no_training(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reporter = tmp_path / "run", KillingReporter()
    real, calls = Run.evaluate_together, itertools.count()

    def failing(run: Run, model: Any, data: Any) -> Any:
        if next(calls) in (0, 1, 3):  # after the first epoch, when resumed, after the last epoch
            raise DataError("an image went away")
        return real(run, model, data)

    monkeypatch.setattr(Run, "evaluate_together", failing)
    for _ in range(3):
        with pytest.raises(DataError, match="went away"):
            train(tiny_recipe(), out, reporter, stage="meta")
    train(tiny_recipe(), out, reporter, stage="meta")
    assert reporter.reported == [("meta", step) for step in range(1, 11)]
    assert metrics(out)["meta"] == metrics(reference[0])["meta"]
    assert [(out / "meta" / name).read_text() for name in ("last", "best")] == [
        (reference[0] / "meta" / name).read_text() for name in ("last", "best")
    ]


def test_an_image_that_cannot_be_read_costs_no_step(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reporter = tmp_path / "run", KillingReporter()
    real, calls = ImageDataset.image, itertools.count()

    def failing(images: ImageDataset, index: int) -> Any:
        if next(calls) == 100:  # in the fourth batch of 32
            raise DataError("an image went away")
        return real(images, index)

    monkeypatch.setattr(ImageDataset, "image", failing)
    with pytest.raises(DataError, match="went away"):
        train(tiny_recipe(), out, reporter, stage="meta")
    assert (out / "meta" / "last").read_text() == "step_000003"
    train(tiny_recipe(), out, reporter, stage="meta")
    assert reporter.reported == [("meta", step) for step in range(1, 11)]
    assert metrics(out)["meta"] == metrics(reference[0])["meta"]


def test_a_kill_before_the_pointer_to_the_last_checkpoint_loses_nothing(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = checkpoints.write_text

    def dying(path: Path, text: str) -> None:
        if path.name == "last" and text == "step_000010" and path.parent.name == "end_to_end":
            raise Killed
        real(path, text)

    monkeypatch.setattr(checkpoints, "write_text", dying)
    with pytest.raises(Killed):
        train(tiny_recipe(), out, Reporter(quiet=True))
    assert (out / "end_to_end" / "last").read_text() == "step_000005"
    monkeypatch.undo()
    train(tiny_recipe(), out, Reporter(quiet=True))
    assert_same_run(out, reference[0])


def test_a_write_that_fails_is_one_error_and_the_run_goes_on_later(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # A limit on file sizes fails like a full disk: in the middle of a write, in any file.
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text((reference[0] / "recipe.yaml").read_text())
    out = tmp_path / "run"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from m2mkd.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", str(recipe), "--out", str(out)]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "cannot write" in errors[0] and "Traceback" not in failed.stderr
    train(tiny_recipe(), out, Reporter(quiet=True))
    assert_same_run(out, reference[0])


def test_one_pair_killed_and_resumed_alone_ends_like_an_undisturbed_pair(tmp_path: Path) -> None:
    recipe = tiny_recipe(distill__mode="separate")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for out in (straight, killed):
        for stage in ("meta", "teacher"):
            assert train(recipe, out, Reporter(quiet=True), stage=stage) is None
    train(recipe, straight, Reporter(quiet=True), stage="distill", pair=1)
    for step in (2, 5, 8):
        with pytest.raises(Killed):
            reporter = KillingReporter("distill/pair-01", step)
            train(recipe, killed, reporter, stage="distill", pair=1)
    train(recipe, killed, Reporter(quiet=True), stage="distill", pair=1)
    assert metrics(killed)["distill/pair-01"] == metrics(straight)["distill/pair-01"]
    assert not (killed / "distill" / "pair-00").exists()


def test_ctrl_c_saves_at_once_and_the_run_goes_on(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"

    class Pressing(KillingReporter):
        def step(self, done: int, **numbers: float) -> None:
            Reporter.step(self, done, **numbers)
            if (self.job, done) == self.victim:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped in meta after step 3 of 10"):
        train(tiny_recipe(), out, Pressing("meta", 3))
    assert (out / "meta" / "last").read_text() == "step_000003"
    train(tiny_recipe(), out, Reporter(quiet=True))
    assert_same_run(out, reference[0])


def test_sigkill_from_outside_at_arbitrary_times_changes_nothing(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text((reference[0] / "recipe.yaml").read_text())
    out = tmp_path / "run"
    command = [sys.executable, "-m", "m2mkd.cli", "train", str(recipe), "--out", str(out)]
    for stage in ("incubation", "end_to_end"):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / stage / "metrics.jsonl").is_file():
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert_same_run(out, reference[0])


def test_separate_pairs_end_within_rounding_of_joint_ones(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # Without router noise, which draws other random numbers in a joint pass.
    common = {"student__model_args__router_noise": 0.0}
    losses = {}
    for mode in ("joint", "separate"):
        recipe = tiny_recipe(distill__mode=mode, **common)
        out = tmp_path / mode
        for stage in ("meta", "teacher", "distill"):
            train(recipe, out, Reporter(quiet=True), stage=stage)
        runs = [load_model_weights(out / "distill" / f"pair-{i:02d}") for i in range(2)]
        losses[mode] = {k: v for run in runs for k, v in run.items()}
    assert losses["joint"].keys() == losses["separate"].keys()
    for name, value in losses["joint"].items():
        torch.testing.assert_close(value, losses["separate"][name], atol=2e-3, rtol=0)


def load_model_weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / (stage / "last").read_text() / "model.safetensors")


def test_changed_settings_repeat_only_what_depends_on_them(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference[0], out)
    reporter = KillingReporter()
    train(tiny_recipe(end_to_end__lr=2e-3, baselines=["end_to_end_only"]), out, reporter)
    assert {job for job, _ in reporter.reported} == {"end_to_end", "baselines/end_to_end_only"}
    kept = {path.name for path in (out / "superseded").iterdir()}
    assert kept == {"end_to_end-0", "baselines-end_to_end_only-0"}


@pytest.mark.parametrize("poison", ["blocks.0.norm1.weight", "blocks.0.mlp.fc2_bias"])
def test_a_loss_that_is_not_finite_names_stage_pair_and_step(tmp_path: Path, poison: str) -> None:
    recipe = tiny_recipe()
    out = tmp_path / "run"
    for stage in ("meta", "teacher"):
        train(recipe, out, Reporter(quiet=True), stage=stage)
    run = Run(recipe, out, Reporter(quiet=True))
    original = run.networks.student_modules

    def poisoned() -> Any:
        modules = original()
        dict(modules[1].named_parameters())[poison].data.flatten()[0] = float("nan")
        return modules

    run.networks.student_modules = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"stage distill/joint, step 0: pair-01: .*(nan|NaN)"):
        run.train_pairs()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    schedule = {"epochs": 2, "lr": 1e25, "optimizer": "sgd", "warmup_epochs": 1, "warmup_lr": 1e-6}
    recipe = tiny_recipe(meta=schedule)
    with pytest.raises(TrainingError, match=r"lower meta\.lr \(now 1e\+25\)") as caught:
        train(recipe, tmp_path / "run", Reporter(quiet=True))
    assert "checkpoint" in str(caught.value)


def test_a_damaged_newest_checkpoint_is_passed_over(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = tiny_recipe(checkpoint_every=2)
    with pytest.raises(Killed):
        train(recipe, out, KillingReporter("meta", 7))
    newest = out / "meta" / (out / "meta" / "last").read_text()
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    reporter = KillingReporter()
    messages: list[str] = []
    reporter.message = messages.append  # type: ignore[method-assign]
    train(recipe, out, reporter)
    assert any("is damaged" in m and "earlier step" in m for m in messages)
    assert metrics(out) == metrics(reference[0])


def test_a_folder_without_a_readable_checkpoint_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny_recipe(), out, KillingReporter("meta", 7))
    for path in out.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no readable checkpoint in .*remove that folder"):
        train(tiny_recipe(), out, Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__depths": [2, 3]}, "teacher.depths .* sums to 5, but the model has 4 blocks"),
        ({"teacher__depths": [1, 1, 1, 1, 1]}, "asks for 5 modules of a model with 4 blocks"),
        ({"student__depths": [2]}, "has 1 modules, but the teacher is cut into 2"),
        ({"student__model": "vit_tiny_patch16_224"}, "cannot be built|not modular"),
        ({"student__model_args__patch_size": 2}, "same patch_size"),
        ({"student__model_args__capacity_factor": 0.001}, "capacity 0 from num_tokens"),
        ({"meta__optimizer": "adamwv"}, "meta.optimizer='adamwv'"),
        ({"end_to_end__optimizer": "lambada"}, "end_to_end.optimizer='lambada'"),
        ({"distill__schedule": {**SCHEDULE, "scheduler": "cosin"}}, "distill.schedule.scheduler"),
        ({"end_to_end__scheduler": "plateau"}, "end_to_end.scheduler='plateau'"),
        ({"student__model_args__gate": "softmx"}, "gate='softmx' is none of"),
        ({"student__model_args__z_weight": "high"}, "z_weight='high' is not a number"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"teacher__model": "deit_tiny_distilled_patch16_224"}, "take a ViT with one class token"),
    ],
)
def test_impossible_recipes_stop_before_anything_is_trained(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reporter = KillingReporter()
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe(**changes), tmp_path / "run", reporter)
    assert reporter.reported == []


def test_a_missing_teacher_file_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = tiny_recipe(teacher__incubate=None, teacher__checkpoint=str(tmp_path / "no.pth"))
    with pytest.raises(CheckpointError, match=r"no\.pth does not exist"):
        train(recipe, tmp_path / "run", KillingReporter())


def test_a_given_teacher_with_another_head_must_be_trained(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, _ = load_model(reference[0] / "teacher")
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}
    path = tmp_path / "teacher.safetensors"
    save_file(weights, path)
    given = {"teacher__incubate": None, "teacher__checkpoint": str(path)}
    with pytest.raises(ConfigError, match=r"no head for 10 classes.*set teacher\.finetune"):
        run = Run(tiny_recipe(**given, teacher__finetune=None), tmp_path / "run", KillingReporter())
        run.train_teacher()
    run = Run(tiny_recipe(**given), tmp_path / "run", KillingReporter())
    assert torch.equal(
        run.networks.teacher().blocks[0].norm1.weight, weights["blocks.0.norm1.weight"]
    )


def test_a_given_teacher_that_fits_is_taken_as_it_is(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = reference[0] / "teacher"
    path = source / (source / "last").read_text() / "model.safetensors"
    recipe = tiny_recipe(
        teacher__incubate=None, teacher__finetune=None, teacher__checkpoint=str(path), baselines=[]
    )
    summary = train(recipe, tmp_path / "run", Reporter(quiet=True))
    assert summary is not None
    assert summary["accuracy"]["teacher"] == reference[1]["accuracy"]["teacher"]
    taken, given = load_model_weights(tmp_path / "run" / "teacher"), load_file(path)
    assert all(torch.equal(taken[name], given[name]) for name in given)


def test_a_student_can_start_as_the_teacher_of_a_run(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    sizes = {**VALUES["student"]["model_args"], "embed_dim": 24, "depth": 4}
    fresh = {"student__model_args": sizes, "student__depths": [2, 2]}
    recipe = tiny_recipe(**fresh, student__upcycle_from=str(reference[0] / "teacher"))
    run = Run(recipe, tmp_path / "run", KillingReporter())
    source, _ = load_model(reference[0] / "teacher")
    for blocks in (run.networks.student().blocks[2:], run.networks.student_modules()[1].blocks):
        mlp = blocks[1].mlp
        assert torch.equal(mlp.fc1_weight[2], source.blocks[3].mlp.fc1.weight)
    other = Run(tiny_recipe(**fresh), tmp_path / "other", KillingReporter()).plan
    changed = {name for name, stage in run.plan.items() if stage.digest != other[name].digest}
    assert changed == set(run.plan) - {"meta", "incubation", "teacher"}
    with pytest.raises(CheckpointError, match=r"student\.upcycle_from .* does not fit"):
        Run(
            tiny_recipe(student__upcycle_from=str(reference[0] / "teacher")),
            tmp_path / "no",
            KillingReporter(),
        )


def test_pairs_begun_alone_are_kept_by_a_joint_run(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for stage in ("meta", "incubation", "teacher"):
        shutil.copytree(reference[0] / stage, out / stage)
    train(tiny_recipe(), out, Reporter(quiet=True), stage="distill", pair=0)
    before = load_model_weights(out / "distill" / "pair-00")
    reporter = KillingReporter()
    train(tiny_recipe(), out, reporter, stage="distill")
    assert {job for job, _ in reporter.reported} == {"distill/pair-01"}
    after = load_model_weights(out / "distill" / "pair-00")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_joint_run_cut_short_can_be_finished_pair_by_pair(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for stage in ("meta", "incubation", "teacher"):
        shutil.copytree(reference[0] / stage, out / stage)
    with pytest.raises(Killed):
        train(tiny_recipe(), out, KillingReporter("distill/joint", 6))
    recipe = tiny_recipe(distill__mode="separate", baselines=[])
    summary = train(recipe, out, Reporter(quiet=True))
    assert summary is not None and summary["seconds"]["distill"] >= 0


def test_a_damaged_mark_of_a_complete_stage_is_one_error(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference[0], out)
    (out / "meta" / "DONE").write_text("[]")
    with pytest.raises(CheckpointError, match=r"meta/DONE.*remove it to redo its stage"):
        train(tiny_recipe(), out, Reporter(quiet=True))


def test_leaving_bad_images_out_repeats_nothing(reference: tuple[Path, dict[str, Any]]) -> None:
    reporter = KillingReporter()
    train(tiny_recipe(data__on_bad_image="skip"), reference[0], reporter)
    assert reporter.reported == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("meta__scheduler", "cosin", "did you mean 'cosine'"),
        ("meta__optimizer", "adamww", "did you mean 'adamw'"),
        ("teacher__model_args", {"act_layer": "gellu"}, "cannot be built with .*: no 'gellu'"),
        ("distill__nac_context", "circuit", "nac_context circuit is for NACs"),
        ("student__upcycle_from", "/gone.pth", r"student\.upcycle_from /gone\.pth does not exist"),
    ],
)
def test_settings_that_a_library_would_refuse_later_are_refused_now(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(M2MKDError, match=words):
        Run(tiny_recipe(**{key: value}), tmp_path, Reporter(quiet=True))


def test_networks_that_cannot_be_cut_are_refused_before_training(tmp_path: Path) -> None:
    distilled = tiny_recipe(teacher__model="deit_tiny_distilled_patch16_224")
    with pytest.raises(ConfigError, match="VisionTransformerDistilled cannot be cut into modules"):
        Run(distilled, tmp_path, Reporter(quiet=True))
    unsaid = tiny_recipe(teacher__depths="auto", student__depths="auto")
    with pytest.raises(ConfigError, match=r"student\.depths auto: 4 modules need .* has 2; give"):
        Run(unsaid, tmp_path, Reporter(quiet=True))


def test_other_data_in_the_same_recipe_is_other_work(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = Run(tiny_recipe(), tmp_path, Reporter(quiet=True))
    more = Run(tiny_recipe(data__train_limit=192), tmp_path, Reporter(quiet=True))
    assert all(run.plan[name].digest != more.plan[name].digest for name in run.plan)
    auto = Run(tiny_recipe(teacher__depths="auto"), tmp_path, Reporter(quiet=True))
    assert all(run.plan[name].digest == auto.plan[name].digest for name in run.plan)


def test_stages_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stage distill needs meta, which is not complete"):
        train(tiny_recipe(), tmp_path / "run", Reporter(quiet=True), stage="distill")


def test_an_unfinished_run_is_not_loaded(tmp_path: Path) -> None:
    train(tiny_recipe(), tmp_path / "run", Reporter(quiet=True), stage="meta")
    with pytest.raises(CheckpointError, match=r"is not finished.*m2mkd train"):
        load_model(tmp_path / "run")
    model, _ = load_model(tmp_path / "run" / "meta")
    assert len(model.blocks) == 2
