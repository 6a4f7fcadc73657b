"""Runs whose student is a NAC: modules, contexts, assembly, circuits, and impossible recipes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SCHEDULE, metrics, tiny_recipe

from m2mkd.errors import ConfigError
from m2mkd.models import NAC
from m2mkd.models.checkpoint import load_model, read_checkpoint
from m2mkd.recipe import Recipe
from m2mkd.train.data import ImageData
from m2mkd.train.execute import train
from m2mkd.train.networks import Networks
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run

SIZES = {
    "tokenizer_dims": (8,),
    "grid_dim": 4,
    "state_dim": 16,
    "code_dim": 8,
    "signature_dim": 8,
    "num_inputs": 4,
    "num_mediators": 8,
    "num_outputs": 2,
    "depth": 1,
    "head_dim": 8,
    "signature_loss": "repulsion",
}


def nac_recipe(**changes: Any) -> Recipe:
    """The tiny recipe with a NAC of three modules, and without its slower baselines."""
    values = {
        "teacher__depths": [1, 2, 1],
        "student": {"model": "nac_digits", "model_args": SIZES},
        "distill": {"schedule": SCHEDULE, "stitch": "linear"},
        "baselines": ["end_to_end_only"],
    }
    return tiny_recipe(**(values | changes))


@pytest.mark.parametrize(("context", "assembly"), [("alone", "drop"), ("circuit", "keep")])
def test_a_nac_is_taught_module_by_module_and_put_together(
    tmp_path: Path, context: str, assembly: str
) -> None:
    recipe = nac_recipe(distill__nac_context=context, distill__assembly=assembly)
    summary = train(recipe, tmp_path, Reporter(quiet=True))
    assert summary is not None
    assert len(summary["accuracy"]["student_hybrids"]) == 3
    facts = json.loads((tmp_path / "end_to_end" / "assembly.json").read_text())
    assert all(count > 10 for count in facts["transferred"])
    untouched = set(facts["untouched"])
    assert {"mediator_latents.codes", "mediator_latents.signatures"} <= untouched
    assert not any(name.startswith(("propagators.", "tokenizer.")) for name in untouched)
    stitches = [name for name in facts["dropped"] if "stitch" in name]
    assert bool(stitches) == (assembly == "drop")
    student, _ = load_model(tmp_path / "end_to_end")
    assert isinstance(student, NAC)
    assert (student.stitches is not None) == (assembly == "keep")
    for picture in ("circuit.png", "circuit-history.png"):
        assert (tmp_path / "end_to_end" / picture).stat().st_size > 10_000
    lines = metrics(tmp_path)["end_to_end"]
    validation = [line["validation"] for line in lines if "validation" in line]
    assert [set(line) >= {"top1", "circuit"} for line in validation] == [True, True]
    assert validation[-1]["circuit"]["receivers"] == 8


@pytest.mark.parametrize("context", ["alone", "circuit"])
def test_pairs_trained_alone_equal_pairs_trained_together(tmp_path: Path, context: str) -> None:
    # Without random draws in the modules, whose order differs between the two.
    sizes = {**SIZES, "code_noise": 0.0, "kernel": {"sampling": "none"}}
    found = {}
    for mode in ("joint", "separate"):
        recipe = nac_recipe(
            student__model_args=sizes, distill__mode=mode, distill__nac_context=context
        )
        out = tmp_path / mode
        for stage in ("meta", "teacher", "distill"):
            train(recipe, out, Reporter(quiet=True), stage=stage)
        folders = sorted((out / "distill").glob("pair-*"))
        found[mode] = [
            read_checkpoint(folder / (folder / "last").read_text()).weights for folder in folders
        ]
    assert len(found["joint"]) == 3
    for joint, alone in zip(found["joint"], found["separate"], strict=True):
        assert joint.keys() == alone.keys()
        for name, weight in joint.items():
            torch.testing.assert_close(alone[name], weight, rtol=1e-4, atol=1e-5)


def test_the_regulariser_of_the_signatures_is_part_of_the_loss() -> None:
    recipe = nac_recipe()
    nac = Networks(recipe, ImageData(recipe.data, 0)).student().train()
    nac(torch.zeros(2, 1, 8, 8))
    assert nac.auxiliary_loss is not None
    signatures = nac.mediator_latents.signatures
    (grad,) = torch.autograd.grad(nac.auxiliary_loss, [signatures], allow_unused=True)
    assert grad is not None and grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__depths": [2, 2]}, "has 3 modules .* but the teacher has 2; set teacher.depths"),
        ({"distill__stitch": "norm_linear"}, "cannot have distill.stitch norm_linear"),
        ({"distill__assembly": "fold"}, "cannot have distill.assembly fold"),
        ({"distill__boundary_weight": 0.5}, "cannot have distill.boundary_weight"),
        ({"student__depths": [1, 1, 1]}, r"cannot have student.depths \[1, 1, 1\]"),
        ({"student__model": "vit_tiny_patch16_224"}, "not modular; take one of vmoe_.*, nac_"),
        ({"student__model_args": {"depht": 1}}, "unknown option 'depht'.*depth"),
    ],
)
def test_recipes_that_a_nac_cannot_follow_are_named(changes: dict[str, Any], message: str) -> None:
    if "vit" in str(changes):
        changes = {"student": {"model": "vit_tiny_patch16_224", "model_args": {"patch_size": 4}}}
    recipe = nac_recipe(**changes)
    with pytest.raises(ConfigError, match=message):
        Networks(recipe, ImageData(recipe.data, 0))


@pytest.mark.parametrize(
    ("parallel", "reason"),
    [("fsdp", "scalar parameters"), ("experts", r"experts of a V-MoE, .* has none")],
)
def test_a_nac_cannot_be_divided(parallel: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}.*set parallel: ddp"):
        Run(nac_recipe(parallel=parallel), tmp_path, Reporter(quiet=True))
