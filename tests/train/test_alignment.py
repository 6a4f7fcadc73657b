"""A teacher that was trained elsewhere: the meta model learns from its modules before the pairs."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SCHEDULE, Killed, KillingReporter, metrics, tiny_recipe

from m2mkd.distill import AlignTask
from m2mkd.errors import CheckpointError
from m2mkd.models import create_meta, create_vit, split_vit, start_as_teacher
from m2mkd.recipe import Recipe
from m2mkd.train.alignment import hosting_meta
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
SHAPE: dict[str, Any] = {"num_classes": 10, "image_size": 8, "channels": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm ViT trained elsewhere, as a file."""
    out = tmp_path_factory.mktemp("elsewhere")
    finetune = {"epochs": 8, "lr": 3e-3}
    recipe = tiny_recipe(teacher__incubate=None, teacher__finetune=finetune, data__train_limit=None)
    recipe = recipe.model_copy(update={"meta": recipe.meta.model_copy(update={"epochs": 0})})
    for stage in ("meta", "teacher"):
        train(recipe, out, Reporter(quiet=True), stage=stage)
    folder = out / "teacher"
    return folder / (folder / "last").read_text() / "model.safetensors"


def given(weights: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "teacher__incubate": None,
        "teacher__finetune": None,
        "teacher__checkpoint": str(weights),
        "meta": {**SCHEDULE, "epochs": 3},
        "baselines": ["logit_kd"],
    }
    return tiny_recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def reference(
    weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run with a given teacher, and its summary."""
    out = tmp_path_factory.mktemp("reference") / "run"
    summary = train(given(weights), out, Reporter(quiet=True))
    assert summary is not None
    return out, summary


def stage_weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / (stage / "last").read_text() / "model.safetensors")


def test_a_given_teacher_has_its_meta_model_aligned_instead_of_trained_on_labels(
    reference: tuple[Path, dict[str, Any]],
) -> None:
    out, summary = reference
    assert not (out / "meta").exists()
    assert (out / "alignment" / "DONE").is_file()
    accuracy = summary["accuracy"]
    assert len(accuracy["hybrids_unaligned"]) == len(accuracy["teacher_hybrids"]) == 2
    assert sum(accuracy["teacher_hybrids"]) > sum(accuracy["hybrids_unaligned"])
    report = (out / "report.html").read_text()
    assert "before the alignment" in report and "learning from the teacher" in report


# 5 steps an epoch, 15 in all: before the first checkpoint, in mid-epoch, on the last step.
@pytest.mark.parametrize("step", [2, 8, 15])
def test_an_alignment_that_was_killed_ends_with_the_same_weights(
    reference: tuple[Path, dict[str, Any]], weights: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(given(weights), out, KillingReporter("alignment", step))
    train(given(weights), out, Reporter(quiet=True), stage="teacher")
    ours, theirs = (stage_weights(run / "alignment") for run in (out, reference[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(out)["alignment"] == metrics(reference[0])["alignment"]
    start = "alignment/start.json"
    assert (out / start).read_text() == (reference[0] / start).read_text()


def test_a_damaged_record_of_the_start_is_made_anew(
    reference: tuple[Path, dict[str, Any]], weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference[0] / "alignment", out / "alignment")
    shutil.copytree(reference[0] / "teacher", out / "teacher")
    (out / "alignment" / "start.json").write_text("{")
    reporter = KillingReporter()
    train(given(weights), out, reporter, stage="teacher")
    start = "alignment/start.json"
    assert (out / start).read_text() == (reference[0] / start).read_text()
    assert reporter.reported == []


def test_pairs_are_taught_in_the_aligned_meta_model(
    reference: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    run = Run(given(weights), reference[0], Reporter(quiet=True))
    meta = hosting_meta(run)
    trained = stage_weights(reference[0] / "alignment")
    assert torch.equal(meta.blocks[1].mlp.fc1.weight, trained["pair-01.blocks.0.mlp.fc1.weight"])
    assert torch.equal(meta.head.weight, trained["pair-01.head.weight"])


def test_a_longer_alignment_repeats_what_follows_it_and_keeps_the_teacher(
    reference: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    plan = Run(given(weights), reference[0], Reporter(quiet=True)).plan
    longer = Run(given(weights, meta=SCHEDULE), reference[0], Reporter(quiet=True)).plan
    changed = {name for name in plan if plan[name].digest != longer[name].digest}
    assert changed == {"alignment", "distill", "end_to_end"}


def test_alignment_can_be_left_out_or_follow_an_incubation(weights: Path, tmp_path: Path) -> None:
    def units(recipe: Recipe) -> list[str]:
        return list(Run(recipe, tmp_path, Reporter(quiet=True)).plan)[:4]

    assert units(given(weights, teacher__align=False))[:3] == ["meta", "teacher", "distill"]
    assert units(tiny_recipe())[:3] == ["meta", "incubation", "teacher"]
    fresh = units(tiny_recipe(teacher__align=True))
    assert fresh == ["meta", "incubation", "teacher", "alignment"]


def test_an_incubated_teacher_can_be_aligned_too(tmp_path: Path) -> None:
    recipe = tiny_recipe(teacher__align=True, baselines=[])
    for stage in ("meta", "teacher"):
        train(recipe, tmp_path, Reporter(quiet=True), stage=stage)
    run = Run(recipe, tmp_path, Reporter(quiet=True))
    before, after = run.load("meta"), hosting_meta(run)
    assert not torch.equal(before.head.weight, after.head.weight)


def test_the_teacher_of_a_run_is_named_by_its_folder(weights: Path, tmp_path: Path) -> None:
    folder = weights.parent.parent
    by_folder = Run(given(folder), tmp_path, Reporter(quiet=True))
    by_file = Run(given(weights), tmp_path, Reporter(quiet=True))
    assert by_folder.plan["teacher"].digest == by_file.plan["teacher"].digest
    loaded = by_folder.networks.teacher().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in load_file(weights).items())


def test_a_teacher_is_cut_into_modules_of_equal_work(tmp_path: Path) -> None:
    # Four patches, two modules of five blocks: patch embedding and head weigh next to nothing
    # against a block, but they do decide where the odd block goes.
    sizes = {**SIZES, "depth": 5}
    recipe = tiny_recipe(teacher__model_args=sizes, teacher__depths="auto")
    assert Run(recipe, tmp_path, Reporter(quiet=True)).networks.teacher_depths == [2, 3]


def test_pairs_wait_for_the_alignment(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(given(weights), tmp_path, KillingReporter("alignment", 7))
    with pytest.raises(CheckpointError, match="stage distill needs alignment"):
        train(given(weights), tmp_path, Reporter(quiet=True), stage="distill")


def test_a_meta_model_starts_with_the_parts_of_its_teacher() -> None:
    teacher = create_vit("vit_tiny_patch16_224", SIZES, **SHAPE)
    meta = create_meta("vit_tiny_patch16_224", SIZES, num_modules=2, **SHAPE)
    start_as_teacher(meta, teacher, [1, 3])
    own, theirs = meta.state_dict(), teacher.state_dict()
    for name in ("patch_embed.proj.weight", "pos_embed", "norm.weight", "head.bias"):
        assert torch.equal(own[name], theirs[name])
    for i in (0, 1):
        assert torch.equal(
            own[f"blocks.{i}.attn.qkv.weight"], theirs[f"blocks.{i}.attn.qkv.weight"]
        )
    meta.head.weight.data.zero_()
    assert teacher.head.weight.abs().sum() > 0


def test_a_meta_model_of_a_vmoe_takes_the_blocks_that_fit_its_own() -> None:
    def start(moe_blocks: str | list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = {**SIZES, "num_experts": 2, "moe_blocks": moe_blocks}
        teacher = create_vit("vmoe_tiny_patch16_224", sizes, **SHAPE)
        meta = create_meta("vmoe_tiny_patch16_224", sizes, num_modules=2, **SHAPE)
        weights = [block.attn.qkv.weight.clone() for block in meta.blocks]
        start_as_teacher(meta, teacher, [2, 2])
        theirs = [block.attn.qkv.weight for block in teacher.blocks]
        assert torch.equal(meta.blocks[0].attn.qkv.weight, theirs[0])
        return meta.blocks[1].attn.qkv.weight, torch.stack(list(theirs)), weights[1]

    second, theirs, _ = start("every_2")  # experts in blocks 1 and 3, and in the meta model's 1
    assert torch.equal(second, theirs[3])
    second, theirs, fresh = start([1])  # the second module has no block with experts
    assert torch.equal(second, fresh)


def test_modules_that_do_what_the_teachers_do_have_nothing_to_learn() -> None:
    teacher = create_vit("vit_tiny_patch16_224", SIZES, **SHAPE)
    torch.nn.init.normal_(teacher.head.weight, std=0.5)  # timm's starts at zero: all alike
    task = AlignTask(list(split_vit(teacher, [2, 2])), list(split_vit(teacher, [2, 2])))
    result = task(torch.randn(3, 1, 8, 8), torch.zeros(3, 10))
    assert result["loss"].item() == pytest.approx(0.0, abs=1e-6)
    other = create_vit("vit_tiny_patch16_224", SIZES, **SHAPE)
    task = AlignTask(list(split_vit(other, [2, 2])), list(split_vit(teacher, [2, 2])))
    result = task(torch.randn(3, 1, 8, 8), torch.zeros(3, 10))
    assert result["pair-00/loss"] > 0.1 and result["pair-01/loss"] > 0.01
    assert result["loss"] == result["pair-00/loss"] + result["pair-01/loss"]


def test_an_alignment_trains_the_meta_model_alone_and_each_module_by_itself() -> None:
    teacher = create_vit("vit_tiny_patch16_224", SIZES, **SHAPE)
    torch.nn.init.normal_(teacher.head.weight, std=0.5)
    meta = create_meta("vit_tiny_patch16_224", SIZES, num_modules=2, **SHAPE)
    task = AlignTask(list(split_vit(meta, [1, 1])), list(split_vit(teacher, [2, 2]))).train()
    assert not task.teacher.training and task.trainable_module.training
    task(torch.randn(3, 1, 8, 8), torch.zeros(3, 10))["pair-01/loss"].backward()
    assert meta.blocks[0].mlp.fc1.weight.grad is None
    assert meta.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
