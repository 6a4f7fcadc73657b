"""Classifying image files with an exported file; needs no PyTorch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2mkd.errors import DataError
from m2mkd.export.preprocess import prepare, read_image
from m2mkd.export.session import Floats, OnnxClassifier

_BATCH_SIZE = 32
_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass
class Prediction:
    """The answer for one image.

    Attributes:
        image: The file.
        top: Class names and probabilities, best first; empty where the file cannot be read.
        problem: Why it cannot be read, or None.
    """

    image: Path
    top: list[tuple[str, float]]
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values."""
        if self.problem is not None:
            return {"image": str(self.image), "error": self.problem}
        top = [{"class": name, "probability": round(value, 6)} for name, value in self.top]
        return {"image": str(self.image), "top": top}


def predict(classifier: OnnxClassifier, paths: Iterable[Path], *, top: int) -> Iterator[Prediction]:
    """Classifies files, and the image files below folders, in order.

    Args:
        classifier: The network.
        paths: Files and folders.
        top: How many classes to report per image.

    Yields:
        One prediction per file; an unreadable file does not keep the others from being classified.
    """
    config = classifier.metadata.preprocessing
    batch: list[Prediction] = []
    pixels: list[Floats] = []
    for path in _files(paths):
        prediction = Prediction(path, [])
        try:
            pixels.append(prepare(_read(path, config["input_size"][0]), config))
        except DataError as error:
            prediction.problem = str(error)
        batch.append(prediction)
        if len(pixels) == _BATCH_SIZE:
            yield from _classify(classifier, batch, pixels, top)
            batch, pixels = [], []
    yield from _classify(classifier, batch, pixels, top)


def _classify(
    classifier: OnnxClassifier, batch: list[Prediction], pixels: list[Floats], top: int
) -> list[Prediction]:
    """Fills in the readable predictions of a batch; `pixels` holds one image for each of these."""
    if pixels:
        names = classifier.metadata.class_names
        readable = [prediction for prediction in batch if prediction.problem is None]
        for prediction, row in zip(
            readable, classifier.probabilities(np.stack(pixels)), strict=True
        ):
            best = np.argsort(-row, kind="stable")[:top]
            prediction.top = [(names[i], float(row[i])) for i in best]
    return batch


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in _EXTENSIONS)
        # A folder without images stands for itself, and cannot be read.
        yield from images or [path]


def _read(path: Path, channels: int) -> Image.Image:
    if path.is_dir():
        known = " ".join(sorted(_EXTENSIONS))
        raise DataError(f"folder {path} holds no image files ({known})")
    return read_image(path, channels)
