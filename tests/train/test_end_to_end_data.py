"""Runs whose student goes on with other images: what moves, who sees what, and what is redone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from test_nac_run import nac_recipe
from tiny import tiny_recipe

from m2mkd.cli.main import main
from m2mkd.errors import ConfigError, DataError
from m2mkd.export.sources import run_data
from m2mkd.models import NAC, create_vit
from m2mkd.models.adapt import adapt
from m2mkd.models.checkpoint import load_model
from m2mkd.recipe import Recipe
from m2mkd.train.data import ImageData
from m2mkd.train.execute import train
from m2mkd.train.networks import Networks
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run

ONCE = {"epochs": 1, "lr": 1e-3}
CLASSES = ("dark", "grey", "light")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that the digits do not have, of 12 pixels."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 4)):
        for i, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                path = root / split / name / f"{k}.png"
                Image.new("L", (12, 12), 100 * i + 5 * k).save(path)
    return root


def own_data(root: Path, **changes: Any) -> dict[str, Any]:
    values = {"dataset": "image_folder", "root": str(root), "image_size": 12, "channels": 1}
    return {**values, "batch_size": 8, **changes}


def changed(root: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "meta": ONCE,
        "teacher__incubate": None,
        "teacher__finetune": ONCE,
        "distill": {
            "schedule": ONCE,
            "stitch": "linear",
            "grid": "resize",
            "classifier": "reset",
        },
        "end_to_end": ONCE,
        "end_to_end_data": own_data(root),
        "baselines": ["end_to_end_only"],
    }
    return tiny_recipe(**(values | changes))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run, and its summary."""
    out = tmp_path_factory.mktemp("runs") / "other"
    summary = train(changed(images), out, Reporter(quiet=True))
    assert summary is not None
    return out, summary


Finished = tuple[Path, dict[str, Any]]


def test_only_students_see_the_other_images(run: Finished) -> None:
    out, summary = run
    assert summary["validation_images"] == 12
    assert summary["pairs_data"] == {"dataset": "digits", "validation_images": 500}
    sizes = {}
    for stage in ("meta", "teacher", "end_to_end", "baselines/end_to_end_only"):
        _, checkpoint = load_model(out / stage)
        card = checkpoint.card
        assert card.preprocessing["input_size"] == [1, card.image_size, card.image_size]
        sizes[stage] = (card.num_classes, card.image_size, checkpoint.meta["images_per_step"])
    assert sizes == {
        "meta": (10, 8, 32),
        "teacher": (10, 8, 32),
        "end_to_end": (3, 12, 8),
        "baselines/end_to_end_only": (3, 12, 8),
    }
    assert {path.stem.split("_")[1] for path in (out / "samples").iterdir()} == set(CLASSES)


def test_the_assembly_says_what_did_not_move(run: Finished) -> None:
    facts = json.loads((run[0] / "end_to_end" / "assembly.json").read_text())
    assert (facts["grid"], facts["classifier"]) == ("resize", "reset")
    assert {"1: head.weight", "1: head.bias"} <= set(facts["dropped"])
    assert set(facts["untouched"]) == {"1: head.weight", "1: head.bias"}
    assert facts["accuracy"]["count"] == 12


def test_commands_take_the_images_of_the_network_at_hand(run: Finished) -> None:
    out, summary = run
    assert run_data(out).dataset == "image_folder"
    assert run_data(out, "teacher").dataset == "digits"
    for source, key in ((out, "m2mkd"), (out / "teacher", "teacher")):
        result = CliRunner().invoke(main, ["evaluate", str(source), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["top1"] == pytest.approx(
            summary["accuracy"][key], abs=5e-4
        )
    page = (out / "report.html").read_text()
    assert "teacher, on digits" in page and "12 held-out images" in page
    assert "digits, and it goes on with image_folder" in page


def test_a_dry_run_shows_both_data_sets(run: Finished) -> None:
    recipe = str(run[0] / "recipe.yaml")
    result = CliRunner().invoke(main, ["train", recipe, "--out", str(run[0]), "--dry-run"])
    assert "data       digits: 160 training and 500 validation images, 10 classes" in result.output
    assert "end to end image_folder: 24 training and 12 validation images, 3" in result.output
    steps = {line.split()[0]: line.split()[3] for line in result.output.splitlines()[5:]}
    assert steps["distill"] == "5" and steps["end_to_end"] == "3"
    assert "to do" not in result.output


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({}, set()),
        ({"end_to_end_data__batch_size": 4}, {"end_to_end", "baselines/end_to_end_only"}),
        ({"end_to_end_data__workers": 2}, set()),
        ({"distill__grid": "reset"}, {"end_to_end"}),
        ({"data__train_limit": 150}, {"meta", "teacher", "distill", "end_to_end"}),
    ],
)
def test_a_change_repeats_what_depends_on_it(
    run: Finished, images: Path, changes: dict[str, Any], redone: set[str]
) -> None:
    values = {"end_to_end_data": own_data(images)}
    values |= changes
    again = Run(changed(images, **values), run[0], Reporter(quiet=True))
    assert {name for name in again.plan if not again.is_done(name)} == redone


def test_the_same_recipe_without_other_images_has_other_students(
    run: Finished, images: Path
) -> None:
    recipe = changed(images, end_to_end_data=None, distill={"schedule": ONCE, "stitch": "linear"})
    again = Run(recipe, run[0], Reporter(quiet=True))
    undone = {name for name in again.plan if not again.is_done(name)}
    assert undone == {"end_to_end", "baselines/end_to_end_only"}


@pytest.mark.parametrize("grid", ["resize", "reset"])
def test_a_nac_keeps_what_its_images_and_classes_leave(images: Path, grid: str) -> None:
    recipe = nac_recipe(
        end_to_end_data=own_data(images, image_size=16),
        distill__grid=grid,
        distill__classifier="reset",
    )
    networks = Networks(
        recipe, ImageData(recipe.data, 0), ImageData(recipe.data_of("end_to_end"), 0)
    )
    modules = [module.state_dict() for module in networks.student_modules()]
    modules = [{name: torch.full_like(t, 0.5) for name, t in m.items()} for m in modules]
    student = networks.student(recipe.distill.assembly)
    assert isinstance(student, NAC)
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    report = networks.assemble(student, modules)
    assert ("0: tokenizer.grid" in report.dropped) == (grid == "reset")
    assert {"pooling.classifier.weight", "pooling.classifier.bias"} <= set(report.untouched)
    for name, tensor in student.state_dict().items():
        if name in report.untouched:
            assert torch.equal(tensor, first[name]), name
        else:
            torch.testing.assert_close(tensor, torch.full_like(tensor, 0.5))
    assert student(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_resized_with_and_without_one_of_the_class_token(
    no_embed_class: bool,
) -> None:
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    sizes |= {"no_embed_class": no_embed_class}
    small, large = (
        create_vit("vit_tiny_patch16_224", sizes, num_classes=3, image_size=size, channels=1)
        for size in (8, 12)
    )
    resized = adapt("pos_embed", torch.ones_like(small.pos_embed), large, grid="resize")
    assert resized is not None and resized.shape == large.pos_embed.shape
    torch.testing.assert_close(resized, torch.ones_like(resized))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__grid": "keep"}, "image_size 12 is not data.image_size 8.*distill.grid to res"),
        ({"distill__classifier": "keep"}, r"other classes \(3\) than data \(10\).*classifier: res"),
    ],
)
def test_what_cannot_move_needs_a_choice_before_anything_is_trained(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Run(changed(images, **changes), tmp_path, Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_to_end_data": None}, "distill.grid resize is for a student that goes on with end_"),
        ({"baselines": ["logit_kd"]}, "logit_kd does not go with end_to_end_data .the teacher"),
        ({"baselines": ["equal_updates"]}, "equal_updates does not go with end_to_end_data"),
        ({"channels": 3}, "end_to_end_data.channels 3 is not data.channels 1; set both alike"),
        ({"dataset": "imagenet_r"}, "imagenet_r has no training images"),
        ({"root": None}, "image_folder needs a folder; set end_to_end_data.root"),
    ],
)
def test_impossible_recipes_are_named(images: Path, changes: dict[str, Any], message: str) -> None:
    if not changes.keys() & {"end_to_end_data", "baselines"}:
        changes = {"end_to_end_data": {**own_data(images), **changes}}
    with pytest.raises(ConfigError, match=message):
        changed(images, **changes)


def test_mistakes_in_the_data_name_their_section(images: Path, tmp_path: Path) -> None:
    quiet = Reporter(quiet=True)
    too_large = own_data(images, batch_size=16, accumulate=2)
    with pytest.raises(ConfigError, match=r"lower end_to_end_data.batch_size"):
        Run(changed(images, end_to_end_data=too_large), tmp_path, quiet)
    unknown = own_data(images, augment={"auto_augment": "rnd"})
    with pytest.raises(ConfigError, match=r"end_to_end_data.augment.auto_augment='rnd' is not a"):
        Run(changed(images, end_to_end_data=unknown), tmp_path, quiet)
    (tmp_path / "idx").mkdir()
    no_idx = own_data(tmp_path / "idx", dataset="fashion_mnist")
    with pytest.raises(DataError, match=r"set end_to_end_data.root to the folder of the idx"):
        Run(changed(images, end_to_end_data=no_idx), tmp_path, quiet)
