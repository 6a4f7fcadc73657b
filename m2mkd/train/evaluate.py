"""Accuracy of networks and hybrids on held-out images.

Letters: B batch, C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from m2mkd.errors import DataError
from m2mkd.train.world import World

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Results over a data set: accuracies in per cent, mean cross-entropy, number of images."""

    top1: float
    top5: float
    loss: float
    count: int


def evaluate_logits(predict: Callable[[Tensor], Tensor], batches: Batches) -> Evaluation:
    """Grades anything that maps images [B, channels, H, W] to logits [B, C].

    Raises:
        DataError: There is not a single image.
    """
    return _mean(_sums(predict, batches))


def evaluate_model(model: nn.Module, batches: Batches, device: torch.device | str) -> Evaluation:
    """Grades a network in eval mode, without gradients; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return evaluate_logits(lambda images: model(images.to(device)), batches)
    finally:
        model.train(was_training)


def restricted(
    predict: Callable[[Tensor], Tensor], known: Sequence[str], wanted: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """Makes a network answer in the classes of a data set that has some of its classes only.

    Sets such as ImageNet-R hold a part of ImageNet's classes; the answer is the best among these.

    Args:
        predict: Maps images to logits [B, C].
        known: Names of the network's classes, in the order of its logits.
        wanted: Names of the data set's classes.

    Returns:
        `predict` itself where the classes are the same; else the logits [B, len(wanted)].

    Raises:
        DataError: The data set has a class that the network does not know.
    """
    # An imported network may have come without its data set: then its classes are numbers.
    is_numbered = list(known) == [str(i) for i in range(len(known))]
    if list(known) == list(wanted) or (is_numbered and len(known) == len(wanted)):
        return predict
    position = {name: i for i, name in enumerate(known)}
    foreign = [name for name in wanted if name not in position]
    if foreign:
        raise DataError(
            f"the data set has other classes than the network was trained on: {_start(wanted)} "
            f"instead of {_start(known)}; {len(foreign)} are not among these, such as {foreign[0]}"
        )
    columns = torch.tensor([position[name] for name in wanted])
    return lambda images: predict(images)[:, columns]


def _start(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"


def evaluate_together(
    model: nn.Module, batches: Batches, world: World, input_size: list[int]
) -> Evaluation:
    """Grades a network that all processes hold, each on its own batches; every image counts once.

    Args:
        model: The network, on the process's device; its mode is restored afterwards.
        batches: This process's; equally many everywhere, some may be empty.
        world: The processes.
        input_size: Channels, height and width of an image.
    """

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(images.to(world.device))
        return logits

    def readable() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            if len(labels):
                yield images, labels
            else:
                # The shards of a network meet in every forward pass, so nobody may leave one out.
                predict(torch.zeros(1, *input_size))

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # sharding does not go with inference mode
            return _mean(world.total(_sums(predict, readable())))
    finally:
        model.train(was_training)


def _sums(predict: Callable[[Tensor], Tensor], batches: Batches) -> list[float]:
    """Sums over images of top-1 and top-5 accuracy in per cent and loss, and their number."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for images, labels in batches:
        logits = predict(images).float()
        labels = labels.to(logits.device)
        top1, top5 = accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))
        loss = F.cross_entropy(logits, labels)
        count = labels.shape[0]
        for i, mean in enumerate((float(top1), float(top5), float(loss), 1.0)):
            sums[i] += mean * count
    return sums


def _mean(sums: list[float]) -> Evaluation:
    top1, top5, loss, count = sums
    if not count:
        raise DataError("the validation set has no readable image")
    return Evaluation(top1 / count, top5 / count, loss / count, int(count))
