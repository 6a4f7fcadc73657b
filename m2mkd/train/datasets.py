"""Labelled image sets: scikit-learn's digits, Fashion-MNIST's idx files, folders of images.

Images come out as PIL images, before any resizing or augmentation. Letters: N images, H height,
W width, C channels.
"""

import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from m2mkd.errors import DataError
from m2mkd.recipe import DataConfig

Indices = npt.NDArray[np.int64]

DIGITS_VALIDATION_IMAGES = 500
# The split of digits and the choice of train_limit are part of what a data set is: they must not
# move with a recipe's seed, or runs with different seeds could not be compared.
SPLIT_SEED = 0


class ArrayImages:
    """Greyscale images held in memory."""

    def __init__(self, images_NHW: npt.NDArray[np.uint8], *, mode: str, source: str) -> None:
        self._images_NHW = images_NHW
        self._mode = mode
        self._source = source

    def read(self, position: int) -> Image.Image:
        """Returns one image, [H, W] pixels."""
        return Image.fromarray(self._images_NHW[position]).convert(self._mode)

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


class ImageDataset:
    """Images with one label each, addressed by index; all of a source or some of it.

    Attributes:
        class_names: Name of every class, in the order of the labels.
        labels: Class of every image, [N], int64.
    """

    def __init__(
        self,
        images: ArrayImages | FileImages,
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


def load_datasets(config: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    """Opens the training and the validation set of a data configuration.

    `train_limit` keeps that many training images, spread evenly over the classes; the choice
    depends on nothing but the set, and a smaller limit chooses a subset of a larger one. A limit
    above the size of the set keeps everything.

    Raises:
        DataError: Files or folders are missing, empty, foreign or inconsistent.
    """
    mode = "L" if config.channels == 1 else "RGB"
    if config.dataset == "digits":
        train, validation = _digits(mode)
    else:
        assert config.root is not None  # DataConfig has checked it
        load = _fashion_mnist if config.dataset == "fashion_mnist" else _image_folder
        train, validation = load(config.root.expanduser(), mode)
    if config.train_limit is not None and config.train_limit < len(train):
        chosen = spread_over_classes(train.labels)[: config.train_limit]
        train = train.subset(np.sort(chosen))
    return train, validation


def spread_over_classes(labels: Indices) -> Indices:
    """Orders indices so that any first part of them holds every class equally often, as far as
    the set allows.

    Args:
        labels: Class of every image, [N], int64.

    Returns:
        A permutation of the indices, [N], int64; the same for the same labels.
    """
    # RandomState's streams are frozen for good, unlike those of newer generators.
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    class_sizes = np.bincount(labels)
    first_of_class = np.cumsum(class_sizes) - class_sizes
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(labels)) - np.repeat(first_of_class, class_sizes)
    return shuffled[np.argsort(rank_in_class, kind="stable")]


def read_image(path: str, mode: str) -> Image.Image:
    """Decodes an image file completely.

    Args:
        path: The file.
        mode: "L" or "RGB".

    Raises:
        DataError: The file is missing, cut short, damaged, not an image, or has more than 8 bits
            per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to 255 and hand back an almost white image.
                raise DataError(
                    f"image {path} has more than 8 bits per channel (mode {image.mode}); "
                    "convert it to 8 bits"
                )
            return image.convert(mode)
    except DataError:
        raise
    except UnidentifiedImageError:
        reason = "it is empty or in no known image format"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
    raise DataError(f"cannot read image {path}: {reason}")


def _digits(mode: str) -> tuple[ImageDataset, ImageDataset]:
    # scikit-learn takes a second to import, and only this set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    class_names = [str(name) for name in digits.target_names]
    whole = ImageDataset(ArrayImages(images_NHW, mode=mode, source="digits"), labels, class_names)
    train, validation = train_test_split(
        np.arange(len(labels)),
        test_size=DIGITS_VALIDATION_IMAGES,
        stratify=labels,
        random_state=SPLIT_SEED,
    )
    return whole.subset(np.sort(train)), whole.subset(np.sort(validation))


def _fashion_mnist(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    return _idx_images(root, "train", mode), _idx_images(root, "t10k", mode)


def _idx_images(root: Path, prefix: str, mode: str) -> ImageDataset:
    images_path = _find_idx(root, f"{prefix}-images-idx3-ubyte")
    labels_path = _find_idx(root, f"{prefix}-labels-idx1-ubyte")
    images_NHW = read_idx(images_path, num_dimensions=3)
    labels = read_idx(labels_path, num_dimensions=1)
    if images_NHW.size == 0:
        raise DataError(f"{images_path} holds no pixels: its shape is {images_NHW.shape}")
    if len(images_NHW) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images_NHW)} images, but {labels_path} {len(labels)} labels"
        )
    class_names = list(FashionMNIST.classes)
    if labels.max() >= len(class_names):
        raise DataError(
            f"{labels_path} holds label {labels.max()}, but Fashion-MNIST has {len(class_names)} "
            "classes; is it another data set?"
        )
    images = ArrayImages(images_NHW, mode=mode, source=str(images_path))
    return ImageDataset(images, labels.astype(np.int64), class_names)


def _find_idx(root: Path, name: str) -> Path:
    """Looks in `root` itself and where torchvision keeps the files, plain and gzipped."""
    folders = [root, root / "FashionMNIST" / "raw"]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise DataError(
        f"fashion_mnist: found neither {name} nor {name}.gz in {folders[0]} or {folders[1]}; "
        f"{_contents(root)}; set data.root to the folder of the idx files"
    )


def read_idx(path: Path, *, num_dimensions: int) -> npt.NDArray[np.uint8]:
    """Reads an idx file of unsigned bytes, the format of MNIST and its successors.

    The file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, and the values.

    Args:
        path: The file, plain or gzipped.
        num_dimensions: 3 for images, 1 for labels.

    Returns:
        A read-only array of the announced shape.

    Raises:
        DataError: The file cannot be read, is not of this kind, or is cut short.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            # Unlike the gzip module this returns what a cut stream still holds, for the message.
            content = zlib.decompressobj(wbits=31).decompress(content)
    except (OSError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    magic = bytes([0, 0, 8, num_dimensions])
    if content[:4] != magic:
        raise DataError(
            f"{path} is not an idx file of unsigned bytes in {num_dimensions} dimension(s): "
            f"expected it to start with bytes {magic.hex(' ')}, "
            f"found {content[:4].hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise DataError(
            f"{path} is damaged: expected {start} bytes or more, found {len(content)}; "
            "fetch it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4))
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise DataError(
            f"{path} is damaged: expected {expected} bytes for shape {shape}, found "
            f"{len(content)}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _image_folder(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    train = _class_folders(root, "train", mode)
    validation = _class_folders(root, "val", mode)
    if train.class_names != validation.class_names:
        only_train = set(train.class_names) - set(validation.class_names)
        only_val = set(validation.class_names) - set(train.class_names)
        raise DataError(
            f"image_folder: {root}/train and {root}/val must hold the same class folders; "
            f"only in train: {_some(only_train)}; only in val: {_some(only_val)}"
        )
    return train, validation


def _class_folders(root: Path, split: str, mode: str) -> ImageDataset:
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"image_folder: expected {root}/train/CLASS/* and {root}/val/CLASS/*, "
            f"but there is no folder {folder}; {_contents(root)}"
        )
    try:
        class_names, class_to_index = find_classes(folder)
        samples = make_dataset(folder, class_to_index, IMG_EXTENSIONS, allow_empty=True)
    except FileNotFoundError:
        raise DataError(
            f"image_folder: expected one folder of images per class in {folder}; "
            f"{_contents(folder)}"
        ) from None
    except OSError as error:
        raise DataError(f"image_folder: cannot list {folder}: {error}") from None
    labels = np.array([label for _, label in samples], dtype=np.int64)
    images_per_class = np.bincount(labels, minlength=len(class_names))
    empty = [class_names[index] for index in np.flatnonzero(images_per_class == 0)]
    if empty:
        raise DataError(
            f"image_folder: no image files ({', '.join(IMG_EXTENSIONS)}) in {folder} for "
            f"class {_some(empty)}; add images or remove the folder"
        )
    images = FileImages([path for path, _ in samples], mode=mode)
    return ImageDataset(images, labels, class_names)


def _contents(folder: Path) -> str:
    """Says in a few words what is in a folder, for messages."""
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        return f"{folder} holds {_some(os.listdir(folder))}"
    except OSError as error:
        return f"cannot list {folder}: {error}"


def _some(names: Iterable[str], at_most: int = 5) -> str:
    """Joins the first few names and counts the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - at_most} more" if len(ordered) > at_most else ""
    return (", ".join(ordered[:at_most]) + more) or "nothing"
