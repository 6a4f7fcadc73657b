"""Accuracy of networks and hybrids on held-out images.

Letters: B batch, C classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from m2mkd.errors import DataError

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
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for images, labels in batches:
        logits = predict(images).float()
        labels = labels.to(logits.device)
        first, five = accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))
        count = labels.shape[0]
        top1.update(float(first), count)
        top5.update(float(five), count)
        loss.update(float(F.cross_entropy(logits, labels)), count)
    if not top1.count:
        raise DataError("the validation set has no readable image")
    return Evaluation(top1.avg, top5.avg, loss.avg, top1.count)


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
