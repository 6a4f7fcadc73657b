"""New heads on frozen features: few-shot episodes and linear probing."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_recipe

from m2mkd.errors import ConfigError, DataError
from m2mkd.train import probe
from m2mkd.train.data import ImageData

CPU = torch.device("cpu")


class Pixels(nn.Module):
    """Features are the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward_features(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images

    def forward_head(self, states: Tensor, pre_logits: bool = False) -> Tensor:
        assert pre_logits
        return states.flatten(1)


def digits() -> ImageData:
    return ImageData(tiny_recipe(data__train_limit=None).data, seed=0)


def test_few_shot_draws_the_published_numbers_of_classes_and_images() -> None:
    model = Pixels()
    episodes = probe.few_shot(model, digits(), CPU, ways=4, shots=5, draws=2)
    assert model.seen == 2 * (4 * 5 + 4 * 15)
    assert [len(set(names)) for names in episodes.classes] == [4, 4]
    assert episodes.classes[0] != episodes.classes[1]
    # 60 validation images: accuracies are multiples of 1/60.
    assert all(round(a * 0.6, 3) == round(a * 0.6) for a in episodes.accuracies)
    assert episodes.mean > 60 and episodes.half_width > 0


def test_few_shot_repeats_itself_and_a_draw_depends_on_its_own_seed_alone() -> None:
    many = probe.few_shot(Pixels(), digits(), CPU, ways=3, shots=2, draws=3)
    again = probe.few_shot(Pixels(), digits(), CPU, ways=3, shots=2, draws=3)
    second = probe.few_shot(Pixels(), digits(), CPU, ways=3, shots=2, draws=1, seed=2)
    assert many == again
    assert second.accuracies[0] == many.accuracies[1] and second.half_width == 0.0


def test_more_ways_than_classes_and_too_many_shots_are_errors() -> None:
    with pytest.raises(ConfigError, match="11 ways need 2 to 10 classes"):
        probe.few_shot(Pixels(), digits(), CPU, ways=11, shots=1, draws=1)
    with pytest.raises(DataError, match=r"has \d+ validation images, but 60 are needed"):
        probe.few_shot(Pixels(), digits(), CPU, ways=2, shots=20, draws=1)


def test_the_network_stays_as_it_was() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=1,
        num_heads=2, num_classes=10,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe.few_shot(model, digits(), CPU, ways=2, shots=1, draws=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.out_features == 10


def test_a_head_separates_what_a_line_separates() -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] * 3 + 0.1 * torch.randn(60, 3)
    head = probe.train_head(features, labels, 3, probe._PROBE, seed=0)
    assert probe._accuracy(head, features, labels) == 100.0


def test_a_head_is_the_same_for_the_same_seed_and_leaves_the_generators_alone() -> None:
    features, labels = torch.randn(8, 4), torch.arange(8) % 2
    state = torch.get_rng_state()
    one, other = (probe.train_head(features, labels, 2, probe._FEW_SHOT, seed=3) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_linear_probing_of_pixels_is_as_good_as_a_linear_classifier() -> None:
    found = probe.linear_probe(Pixels(), digits(), CPU)
    assert found["count"] == 500
    assert 88.0 < found["top1"] <= found["train_top1"]


def test_a_nac_is_probed_by_its_own_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = probe.train_head

    def watched(*args: object, **kwargs: object) -> nn.Linear:
        used.append(args[3])
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "train_head", watched)
    model = timm.create_model("nac_digits", num_classes=10)
    episodes = probe.few_shot(model, digits(), CPU, ways=2, shots=1, draws=1)
    assert used == [probe._FEW_SHOT_NAC] and used[0].epochs == 500
    assert len(episodes.accuracies) == 1
