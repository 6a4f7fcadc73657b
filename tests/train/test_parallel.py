"""Ways for several processes to train together: what they need, without starting processes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SCHEDULE, tiny_recipe

from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp
from m2mkd.recipe import Schedule, load_recipe
from m2mkd.train.loop import _make_optimizer
from m2mkd.train.parallel import ELEMENTWISE, check_parallel
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run
from m2mkd.train.world import World


def updated(optimizer: str, experts: slice) -> Tensor:
    """Some of six experts after three updates."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 5, 4, generator=generator)
    layer = nn.Module()
    layer.weight = nn.Parameter(weights[experts].clone())
    adapt = _make_optimizer(layer, Schedule(epochs=1, lr=1e-2, optimizer=optimizer), "end_to_end")
    for gradients in torch.randn(3, 6, 5, 4, generator=generator):
        layer.weight.grad = gradients[experts].clone()
        adapt.step()
    return layer.weight.detach()


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_optimisers_of_spread_experts_treat_some_experts_as_they_treat_all(optimizer: str) -> None:
    parts = torch.cat([updated(optimizer, slice(0, 2)), updated(optimizer, slice(2, 6))])
    assert torch.equal(updated(optimizer, slice(None)), parts)


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "cadamw"])
def test_an_optimiser_that_looks_at_whole_tensors_is_refused_for_spread_experts(
    optimizer: str, tmp_path: Path
) -> None:
    schedule = {**SCHEDULE, "optimizer": optimizer}
    with pytest.raises(ConfigError, match=rf"end_to_end.optimizer='{optimizer}' .* adamw"):
        Run(tiny_recipe(parallel="experts", end_to_end=schedule), tmp_path, Reporter(quiet=True))


def layers(*counts: int) -> nn.Module:
    return nn.Sequential(*(MoEMlp(4, 4, num_experts=count) for count in counts))


@pytest.mark.parametrize(
    ("changes", "student", "processes", "message"),
    [
        ({}, layers(4, 6), 4, "4 processes cannot share num_experts 6 of student.model vmoe_tiny"),
        ({}, nn.Linear(2, 2), 2, "student.model vmoe_tiny_patch16_224 has none; set parallel: ddp"),
        ({"precision": "fp16"}, layers(4), 2, "fp16 does not go with parallel: experts"),
    ],
    ids=["uneven", "no experts", "fp16"],
)
def test_experts_that_cannot_be_spread_are_one_line(
    changes: dict[str, Any], student: nn.Module, processes: int, message: str
) -> None:
    recipe = tiny_recipe(parallel="experts", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        check_parallel(recipe, student, World(0, processes))
    assert "\n" not in str(caught.value)
    check_parallel(tiny_recipe(parallel="experts"), layers(4, 6), World(0, 2))


def test_experts_and_shards_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"parallel=.*'ddp', 'fsdp' or 'experts'") as caught:
        load_recipe("quickstart", ("parallel=[fsdp, experts]",))
    assert "\n" not in str(caught.value)


def test_one_process_holds_all_experts_whatever_the_recipe_says() -> None:
    recipe = tiny_recipe(parallel="experts")
    check_parallel(recipe, layers(3), World())
