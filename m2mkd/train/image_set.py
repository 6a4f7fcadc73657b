"""A set of labelled images over whatever holds them: memory, files, tar archives, tables.

Images come out as PIL images, before any resizing or augmentation. Letters: N images, H height,
W width, C channels.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from m2mkd.errors import DataError

Indices = npt.NDArray[np.int64]


class ArrayImages:
    """Images held in memory, [N, H, W] or [N, H, W, 3], uint8."""

    def __init__(self, images: npt.NDArray[np.uint8], *, mode: str, source: str) -> None:
        self._images = images
        self._mode = mode
        self._source = source

    def read(self, position: int) -> Image.Image:
        """Returns one image, [H, W] pixels."""
        return Image.fromarray(self._images[position]).convert(self._mode)

    def describe(self, position: int) -> str:
        """Returns the source and the position in it."""
        return f"{self._source} image {position}"


class FileImages:
    """Images in files, decoded when they are asked for."""

    def __init__(self, paths: list[str], *, mode: str) -> None:
        self._paths = paths
        self._mode = mode

    def read(self, position: int) -> Image.Image:
        """Decodes one file; raises what `read_image` does."""
        return read_image(self._paths[position], self._mode)

    def describe(self, position: int) -> str:
        """Returns the path."""
        return self._paths[position]


class TarMember(NamedTuple):
    """Where an image lies in a tar archive: `size` bytes from `offset` on."""

    archive: str
    offset: int
    size: int
    name: str


class TarImages:
    """Images in uncompressed tar archives, read from their places without unpacking."""

    def __init__(self, members: list[TarMember], *, mode: str) -> None:
        self._members = members
        self._mode = mode

    def read(self, position: int) -> Image.Image:
        """Decodes one member; raises what `decode_image` does."""
        member = self._members[position]
        name = self.describe(position)
        try:
            with open(member.archive, "rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise DataError(f"cannot read image {name}: {error}") from None
        return decode_image(content, self._mode, name)

    def describe(self, position: int) -> str:
        """Returns archive and name."""
        member = self._members[position]
        return f"{member.archive}:{member.name}"


class TableImages:
    """Images of a Hugging Face data set, decoded when they are asked for."""

    def __init__(self, table: Any, column: str, *, mode: str, source: str) -> None:
        self._table = table
        self._column = column
        self._mode = mode
        self._source = source

    def read(self, position: int) -> Image.Image:
        """Decodes one image; raises what `decode_image` does."""
        cell = self._table[position][self._column]
        if cell.get("bytes"):
            return decode_image(cell["bytes"], self._mode, self.describe(position))
        return read_image(str(cell.get("path")), self._mode)

    def describe(self, position: int) -> str:
        """Returns the data set and the position in it."""
        return f"{self._source} image {position}"


# Anything that decodes an image by position, and says where it comes from.
ImageSource = ArrayImages | FileImages | TarImages | TableImages


class ImageDataset:
    """Images with one label each, addressed by index; all of a source or some of it.

    Attributes:
        class_names: Name of every class, in the order of the labels.
        labels: Class of every image, [N], int64.
    """

    def __init__(
        self,
        images: ImageSource,
        labels: Indices,
        class_names: list[str],
        positions: Indices | None = None,
    ) -> None:
        """Pairs images with their labels.

        Args:
            images: Where the images are.
            labels: Class of every image of the set, [N], int64.
            class_names: Name of every class.
            positions: Which of `images` the set holds, [N], int64; by default the first N.
        """
        self.labels = labels
        self.class_names = class_names
        self._images = images
        self._positions = np.arange(len(labels)) if positions is None else positions

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has an image here."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        """Returns the class of one image."""
        return int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """Decodes one image, mode L or RGB as the data configuration asks.

        Raises:
            DataError: The file cannot be read; the message names it.
        """
        return self._images.read(int(self._positions[index]))

    def describe(self, index: int) -> str:
        """Returns where one image comes from, for messages."""
        return self._images.describe(int(self._positions[index]))

    def subset(self, indices: Indices) -> "ImageDataset":
        """Returns the images at these indices as a set of their own."""
        return ImageDataset(
            self._images, self.labels[indices], self.class_names, self._positions[indices]
        )


def read_image(path: str, mode: str) -> Image.Image:
    """Decodes an image file completely.

    Args:
        path: The file.
        mode: "L" or "RGB".

    Raises:
        DataError: The file is missing, cut short, damaged, not an image, or has more than 8 bits
            per channel.
    """
    return _decode(path, mode, path)


def decode_image(content: bytes, mode: str, name: str) -> Image.Image:
    """Decodes the bytes of an image file, as `read_image`; `name` is used in errors."""
    return _decode(io.BytesIO(content), mode, name)


def _decode(source: Any, mode: str, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to 255 and hand back an almost white image.
                raise DataError(
                    f"image {name} has more than 8 bits per channel (mode {image.mode}); "
                    "convert it to 8 bits"
                )
            return image.convert(mode)
    except DataError:
        raise
    except UnidentifiedImageError:
        reason = "it is empty or in no known image format"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's formats raise many unrelated types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(f"cannot read image {name}: {reason}")


def contents(folder: Path) -> str:
    """Says in a few words what is in a folder, for messages."""
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        return f"{folder} holds {some(os.listdir(folder))}"
    except OSError as error:
        return f"cannot list {folder}: {error}"


def some(names: Iterable[str], at_most: int = 5) -> str:
    """Joins the first few names and counts the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - at_most} more" if len(ordered) > at_most else ""
    return (", ".join(ordered[:at_most]) + more) or "nothing"
