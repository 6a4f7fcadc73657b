"""Damage to images: of every kind, growing with severity, the same each time, grey or coloured."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_recipe

from m2mkd.train.corruptions import CORRUPTIONS, SEVERITIES, corrupt, measure_corruptions
from m2mkd.train.data import ImageData
from m2mkd.train.progress import Reporter


def picture(channels: int, size: int) -> Tensor:
    """A shape with soft and sharp edges, fine detail, and neither black nor white."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    values_HW = 0.25 + 0.4 * x + 0.15 * ((12 * y).floor() % 2)
    shades = torch.linspace(0.8, 1.0, channels)[:, None, None]
    return (values_HW * shades * 255).to(torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 28), (3, 96)])
def test_damage_grows_with_severity(kind: str, channels: int, size: int) -> None:
    clean = picture(channels, size)
    distances = []
    for severity in SEVERITIES:
        torch.manual_seed(0)
        damaged = corrupt(clean, kind, severity)
        assert damaged.shape == clean.shape and damaged.dtype == torch.uint8
        distances.append(float((damaged.float() - clean.float()).abs().mean()))
    assert distances[0] > 0 and distances[-1] > 1.15 * distances[0]
    assert np.corrcoef(SEVERITIES, distances)[0, 1] > 0.7, distances


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_leaves_the_clean_image_alone_and_works_on_eight_pixels(kind: str) -> None:
    clean = picture(1, 8)
    before = clean.clone()
    corrupt(clean, kind, 5)
    assert torch.equal(clean, before)


def test_grey_pictures_stay_grey_under_impulse_noise() -> None:
    grey = picture(1, 28).expand(3, -1, -1)
    damaged = corrupt(grey, "impulse_noise", 5)
    assert torch.equal(damaged[0], damaged[2])


def test_the_same_damage_is_done_each_time_with_any_workers() -> None:
    one, again, forked = (
        torch.cat([images for images, _ in data.validation_batches(("gaussian_noise", 3))])
        for data in (
            ImageData(tiny_recipe().data, seed=0),
            ImageData(tiny_recipe(data__eval_batch_size=64).data, seed=5),
            ImageData(tiny_recipe(data__workers=1).data, seed=0),
        )
    )
    assert torch.equal(one, again) and torch.equal(one, forked)
    clean = torch.cat([x for x, _ in ImageData(tiny_recipe().data, seed=0).validation_batches()])
    assert not torch.equal(one, clean)


def fake_batches(corruption: tuple[str, int] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Two images whose brightness is the severity of their damage."""
    severity = 0 if corruption is None else corruption[1]
    yield torch.full((2, 1, 1, 1), float(severity)), torch.tensor([0, 1])


def test_every_kind_and_severity_is_graded() -> None:
    def predict(images: Tensor) -> Tensor:
        # All right up to severity 2, half of them beyond.
        severity = images[0, 0, 0, 0]
        return torch.eye(2) if severity <= 2 else torch.tensor([[1.0, 0.0], [1.0, 0.0]])

    found = measure_corruptions(predict, fake_batches, Reporter(quiet=True))
    assert found["clean"] == 100.0 and found["count"] == 2
    assert found["top1"] == {kind: [100.0, 100.0, 50.0, 50.0, 50.0] for kind in CORRUPTIONS}
    assert found["mean"] == 70.0
