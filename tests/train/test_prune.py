"""Pruning the NAC of a run: what is measured, what is chosen and what is written."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from m2mkd.models.nac_pruning import keep_latents, keep_layers, latent_traffic, output_weights
from m2mkd.recipe import load_data, load_recipe
from m2mkd.train import prune
from m2mkd.train.data import ImageData
from m2mkd.train.progress import Reporter
from m2mkd.train.prune import Point, choose, count_flops, prune_run

sys.path.insert(0, str(Path(__file__).parent))
from nac_runs import write_nac_run


@pytest.fixture(autouse=True)
def short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_SECONDS", 1e-4)
    monkeypatch.setattr(prune, "_ROUNDS", 1)
    monkeypatch.setattr(prune, "_FRACTIONS", (1, 1 / 8, 1 / 32))


def prune_to(out: Path, **wishes: Any) -> dict[str, Any]:
    """Prunes the run beside `out`."""
    source = out.parent / "run"
    recipe_file = source / "recipe.yaml"
    quiet = Reporter(quiet=True)
    return prune_run(source, recipe_file, load_data(recipe_file), out, quiet, **wishes)


def points(*pairs: tuple[int, float]) -> list[Point]:
    return [Point(count, 8, 4, 2, top1, 0.0, count, count, 1.0, 1.0) for count, top1 in pairs]


def test_the_pruned_run_holds_the_mediators_with_the_most_traffic(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    out = tmp_path / "small"
    result = prune_to(out, mediators=0.25)
    kept = latent_traffic(model)[1].topk(6).indices.sort().values
    assert result["kept"] == kept.tolist() and (result["mediators"], result["of"]) == (6, 24)
    pruned, checkpoint = load_model(out)
    assert checkpoint.card.model_args["num_mediators"] == 6
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(pruned(images), keep_latents(model, mediators=kept)(images))
    assert json.loads((out / "pruning.json").read_text()) == result
    assert (out / "pruning.png").stat().st_size > 10_000
    assert (out / "samples" / "00000_0.png").read_bytes() == b"an image"


def test_the_curve_runs_from_all_mediators_to_few_and_holds_the_chosen(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    out = tmp_path / "small"
    result = prune_to(out, mediators=0.3)
    counts = [point["mediators"] for point in result["curve"]]
    assert counts == [24, 7, 3, 1]
    assert result["full"]["mediators"] == 24 and result["pruned"]["mediators"] == 7
    flops = [point["circuit_flops"] for point in result["curve"]]
    assert flops == sorted(flops, reverse=True) and flops[0] > 2 * flops[-1]
    assert all(point["circuit_ms"] > 0 < point["circuit_ms_per_image"] for point in result["curve"])


def test_a_student_that_went_on_with_other_images_gives_an_ordinary_run(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    recipe_file = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(recipe_file.read_text())
    values["end_to_end_data"] = values["data"]
    values["distill"] |= {"grid": "reset", "classifier": "reset"}
    values["baselines"] = []
    recipe_file.write_text(yaml.safe_dump(values))
    prune_to(tmp_path / "small", mediators=0.5)
    recipe = load_recipe(str(tmp_path / "small" / "recipe.yaml"))
    assert recipe.end_to_end_data is None and recipe.distill.grid == "keep"


def test_inputs_can_be_pruned_as_well(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    out = tmp_path / "small"
    result = prune_to(out, mediators=1.0, inputs=0.5)
    assert result["kept_inputs"] == sorted(latent_traffic(model)[0].topk(4).indices.tolist())
    sizes = [(point["mediators"], point["inputs"]) for point in result["curve"]]
    assert sizes == [(24, 8), (24, 4), (3, 4), (1, 4)]
    assert (result["pruned"]["mediators"], result["pruned"]["inputs"]) == (24, 4)
    pruned, _ = load_model(out)
    images = torch.randn(2, 1, 8, 8)
    expected = keep_latents(model, inputs=result["kept_inputs"])
    with torch.no_grad():
        assert torch.equal(pruned(images), expected(images))


def test_outputs_can_be_pruned_as_well(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    out = tmp_path / "small"
    result = prune_to(out, mediators=1.0, outputs=0.5)
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    data = ImageData(recipe.data, recipe.seed)
    images = torch.cat([images for images, _ in data.plain_batches(data.train, range(1000))])
    heaviest = output_weights(model, images).topk(2).indices
    assert result["kept_outputs"] == heaviest.sort().values.tolist()
    sizes = [(point["mediators"], point["outputs"]) for point in result["curve"]]
    assert sizes == [(24, 4), (24, 2), (3, 2), (1, 2)]
    pruned, checkpoint = load_model(out)
    assert checkpoint.card.model_args["num_outputs"] == 2
    expected = keep_latents(model, outputs=result["kept_outputs"])
    with torch.no_grad():
        assert torch.equal(pruned(images[:2]), expected(images[:2]))


def test_layers_can_be_pruned_as_well(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    values["student"]["depths"] = [1, 1, 1, 1]
    path.write_text(yaml.safe_dump(values))
    out = tmp_path / "small"
    result = prune_to(out, mediators=1.0, layers=0.5, finetune=1)
    data = ImageData(load_recipe(str(path)).data, 0)
    images, labels = next(iter(data.plain_batches(data.train, range(len(data.train)))))
    (kept,) = result["kept_layers"]
    losses = [F.cross_entropy(keep_layers(model, [layer])(images), labels) for layer in (0, 1)]
    assert losses[kept] == min(losses)
    sizes = [(point["mediators"], point["layers"]) for point in result["curve"]]
    assert sizes == [(24, 2), (24, 1), (3, 1), (1, 1)]
    expected = latent_traffic(keep_layers(model, [kept]))[1].topk(24).indices.sort().values
    assert result["kept"] == expected.tolist()
    pruned, checkpoint = load_model(out)
    assert (pruned.depth, checkpoint.card.depths) == (1, [1, 1, 1])
    assert load_recipe(str(out / "recipe.yaml")).student.depths == "auto"


def test_operations_are_those_of_the_matrix_products_and_edges(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    circuit, total = count_flops(model, torch.randn(1, 1, 8, 8))
    fewer = keep_latents(model, mediators=range(1, 24))
    circuits = [(model.circuit(i), fewer.circuit(i)) for i in range(3)]
    links = sum(full.num_edges - less.num_edges for full, less in circuits)
    pairs = sum(full.to_dense().numel() - less.to_dense().numel() for full, less in circuits)
    # A mediator less: as receiver its query, exit and FFN, as sender keys and values, with 64
    # channels everywhere, in two propagators; its keys and values in the read-out; its codes (32)
    # in all their layers, and its seed; the cosines of its signature (16) with the others.
    layers = 2 * (2 * 64 * 64 + 3 * 128 * 64 + 2 * 64 * 64) + 2 * 64 * 64
    codes = 2 * (32 * 64 * 5 + 32 * 128) + 2 * 32 * 64 + 32 * 64
    assert circuit - count_flops(fewer, torch.randn(1, 1, 8, 8))[0] == (
        2 * (layers + codes + 16 * pairs) + 4 * 64 * links
    )
    assert total > circuit


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 6), (0.5, 4), (5.0, 2), (100.0, 1)])
def test_a_budget_takes_the_fewest_mediators_that_lose_no_more(
    budget: float, expected: int
) -> None:
    curve = points((8, 90.0), (6, 91.0), (4, 89.5), (2, 85.0), (1, 10.0))
    assert choose(curve, None, budget).mediators == expected


def test_fine_tuning_trains_the_pruned_network(tmp_path: Path) -> None:
    model = write_nac_run(tmp_path / "run")
    out = tmp_path / "small"
    result = prune_to(out, budget=100.0, finetune=2)
    assert result["mediators"] == 1 and result["finetuned"]["epochs"] == 2
    tuned, _ = load_model(out)
    before = keep_latents(model, mediators=result["kept"])
    assert not torch.equal(tuned.mediator_latents.codes, before.mediator_latents.codes)
    assert result["finetuned"]["loss"] < result["pruned"]["loss"]


def test_an_imported_run_can_be_pruned_but_not_fine_tuned(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: values[key] for key in ("name", "data", "student")}))
    with pytest.raises(ConfigError, match="'end_to_end' is missing"):
        prune_to(tmp_path / "small", budget=100.0, finetune=1)
    prune_to(tmp_path / "small", budget=100.0)
    assert load_data(tmp_path / "small" / "recipe.yaml") == load_data(path)


def test_what_cannot_be_pruned_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    for wishes, message in (
        ({}, "give either a share of mediators to keep, or a budget"),
        ({"mediators": 0.5, "budget": 1.0}, "give either"),
        ({"mediators": 1.5}, "mediators=1.5 is no share"),
        ({"budget": -1.0}, "budget=-1.0 is not in 0 to 100"),
        ({"budget": 1.0, "inputs": 0.0}, "inputs=0.0 is no share"),
        ({"budget": 1.0, "outputs": 1.5}, "outputs=1.5 is no share"),
        ({"budget": 1.0, "layers": -0.5}, "layers=-0.5 is no share"),
        ({"budget": 1.0, "finetune": -2}, "finetune=-2 epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune_to(tmp_path / "x", **wishes)
    with pytest.raises(CheckpointError, match="run exists; remove it or choose another folder"):
        prune_to(tmp_path / "run", budget=1.0)
    assert not (tmp_path / "x").exists()


def test_a_network_without_mediators_is_refused(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    stage = tmp_path / "run" / "end_to_end"
    card = read_checkpoint(stage / "step_000000").card
    card = replace(card, model="vit_tiny_patch16_224", model_args={"patch_size": 4, "depth": 1})
    write_checkpoint(stage, 0, card.build().state_dict(), meta={"card": asdict(card)})
    with pytest.raises(ConfigError, match="is a VisionTransformer; only a NAC has mediators"):
        prune_to(tmp_path / "small", budget=1.0)
