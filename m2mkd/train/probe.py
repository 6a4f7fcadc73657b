"""What a trained network's features are worth: few-shot episodes and linear probing.

The network stays frozen; only a new linear head on its features is trained. Features are timm's:
`forward_head(forward_features(images), pre_logits=True)`, of images prepared as for evaluation, so
each image passes the network once. Letters: N images, D feature width, C classes.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from m2mkd.errors import ConfigError, DataError
from m2mkd.models.nac import NAC
from m2mkd.train.data import ImageData, ImageDataset

_VALIDATION_PER_SHOT = 3  # held-out images per class and training image (m2mKD's published runs)


@dataclass(frozen=True)
class HeadTraining:
    """How a new head is trained, with a cosine from `lr` to zero."""

    epochs: int
    lr: float
    weight_decay: float
    optimizer: str
    batch_size: int | None  # None: all images


# m2mKD's published few-shot runs: AdamW for V-MoE, SGD for NAC; the batch is ways x shots.
_FEW_SHOT = HeadTraining(100, 2e-3, 0.05, "adamw", None)
_FEW_SHOT_NAC = HeadTraining(500, 3e-4, 0.0, "sgd", None)
_PROBE = HeadTraining(100, 1e-2, 0.0, "adamw", 256)


@dataclass(frozen=True)
class Episodes:
    """Accuracies of repeated few-shot draws, in per cent.

    Attributes:
        accuracies: One per draw.
        mean: Their mean.
        half_width: Half of the 95 % confidence interval of the mean (Student's t); 0 for one draw.
        classes: Names of the classes of each draw.
    """

    accuracies: list[float]
    mean: float
    half_width: float
    classes: list[list[str]]


def few_shot(
    model: nn.Module,
    data: ImageData,
    device: torch.device,
    *,
    ways: int,
    shots: int,
    draws: int,
    seed: int = 1,
) -> Episodes:
    """k-way n-shot classification with a new head, by the protocol of m2mKD's published runs.

    Each draw takes `ways` random classes, `shots` training images of each and 3 x `shots`
    validation images of each; the head trains 100 epochs with the learning rate 2e-3 and one batch
    of all images (NAC: SGD, 500 epochs, 3e-4). The published figure is one draw with seed 1; draw i
    here has seed 1 + i.

    Raises:
        ConfigError: More ways than classes.
        DataError: A class has too few images.
    """
    if not 2 <= ways <= data.num_classes:
        raise ConfigError(f"few-shot: {ways} ways need 2 to {data.num_classes} classes")
    settings = _FEW_SHOT_NAC if isinstance(model, NAC) else _FEW_SHOT
    accuracies, classes = [], []
    for draw in range(draws):
        rng = np.random.RandomState(seed + draw)
        chosen = np.sort(rng.permutation(data.num_classes)[:ways])
        parts = []
        for images, count in ((data.train, shots), (data.validation, _VALIDATION_PER_SHOT * shots)):
            indices = np.concatenate([_draw(images, c, count, rng, data) for c in chosen])
            features_ND, labels_N = extract(model, data, images, indices, device)
            parts += [features_ND, torch.from_numpy(np.searchsorted(chosen, labels_N.numpy()))]
        head = train_head(parts[0], parts[1], ways, settings, seed=seed + draw)
        accuracies.append(_accuracy(head, parts[2], parts[3]))
        classes.append([data.class_names[c] for c in chosen])
    return Episodes(accuracies, statistics.fmean(accuracies), _half_width(accuracies), classes)


def linear_probe(model: nn.Module, data: ImageData, device: torch.device) -> dict[str, float]:
    """Trains a linear classifier on the features of all training images.

    Features are standardised by their mean and deviation over the training images, as a batch norm
    without parameters would; AdamW, 100 epochs, batches of 256, learning rate 1e-2.

    Returns:
        `top1` on the validation images and `train_top1`, per cent, and `count`, validation images.
    """
    train_ND, labels_N = extract(model, data, data.train, np.arange(len(data.train)), device)
    held_ND, held_labels_N = extract(
        model, data, data.validation, np.arange(len(data.validation)), device
    )
    mean_D, std_D = train_ND.mean(dim=0), train_ND.std(dim=0).clamp_min(1e-6)
    train_ND, held_ND = (train_ND - mean_D) / std_D, (held_ND - mean_D) / std_D
    head = train_head(train_ND, labels_N, data.num_classes, _PROBE, seed=0)
    return {
        "top1": _accuracy(head, held_ND, held_labels_N),
        "train_top1": _accuracy(head, train_ND, labels_N),
        "count": len(held_labels_N),
    }


@torch.inference_mode()
def extract(
    model: Any,
    data: ImageData,
    images: ImageDataset,
    indices: npt.NDArray[np.int64],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Features of some images of a set.

    Returns:
        Features [N, D], float32, and labels [N], int64, on the CPU; unreadable images are missing
        where the data configuration skips them.
    """
    model.to(device).eval()
    features, labels = [], []
    for images_BCHW, labels_B in data.plain_batches(images, indices):
        states = model.forward_features(images_BCHW.to(device))
        features.append(model.forward_head(states, pre_logits=True).float().cpu())
        labels.append(labels_B)
    return torch.cat(features), torch.cat(labels)


def train_head(
    features_ND: Tensor, labels_N: Tensor, num_classes: int, settings: HeadTraining, *, seed: int
) -> nn.Linear:
    """Trains a linear layer on features; the same seed gives the same layer."""
    features_ND, labels_N = features_ND.clone(), labels_N.clone()  # no inference tensors
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(features_ND.shape[1], num_classes)
    make: Any = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    momentum = {"momentum": 0.9} if settings.optimizer == "sgd" else {}
    optimizer = make(
        head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **momentum
    )
    size = settings.batch_size or len(labels_N)
    steps = settings.epochs * -(-len(labels_N) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(labels_N), generator=generator).split(size):
            optimizer.zero_grad()
            F.cross_entropy(head(features_ND[rows]), labels_N[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def _draw(
    images: ImageDataset, label: int, count: int, rng: np.random.RandomState, data: ImageData
) -> npt.NDArray[np.int64]:
    found = np.flatnonzero(images.labels == label)
    if len(found) < count:
        split = "training" if images is data.train else "validation"
        raise DataError(
            f"few-shot: class {data.class_names[label]} has {len(found)} {split} images, but "
            f"{count} are needed; ask for fewer shots"
        )
    return rng.permutation(found)[:count]


@torch.no_grad()
def _accuracy(head: nn.Linear, features_ND: Tensor, labels_N: Tensor) -> float:
    return 100.0 * float((head(features_ND).argmax(dim=1) == labels_N).float().mean())


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1)) * error
