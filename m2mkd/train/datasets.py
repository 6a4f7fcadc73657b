"""The data sets a recipe can name, and those read right here: digits and Fashion-MNIST.

Letters: N images, H height, W width.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.datasets import FashionMNIST

from m2mkd.errors import DataError
from m2mkd.recipe import EVALUATION_ONLY, DataConfig
from m2mkd.train import archives, folders
from m2mkd.train.image_set import ArrayImages, ImageDataset, Indices, contents

DIGITS_VALIDATION_IMAGES = 500
# The split of digits and the choice of train_limit are part of what a data set is: they must not
# move with a recipe's seed, or runs with different seeds could not be compared.
SPLIT_SEED = 0


def load_datasets(config: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    """Opens the training and the validation set of a data configuration.

    `train_limit` keeps that many training images, spread evenly over the classes; the choice
    depends on nothing but the set, and a smaller limit chooses a subset of a larger one. A limit
    above the size of the set keeps everything.

    Raises:
        DataError: Files or folders are missing, empty, foreign, inconsistent or not to be read; or
            there are not two classes.
    """
    try:
        train, validation = _open_datasets(config)
    except DataError:
        raise
    except OSError as error:  # such as a missing permission, anywhere in a tree
        raise DataError(f"{config.dataset}: cannot read the data: {error}") from None
    if not len(validation) or not (len(train) or config.dataset in EVALUATION_ONLY):
        raise DataError(
            f"{config.dataset}: there are {len(train)} training and {len(validation)} validation "
            f"images; both are needed; check data.root {config.root}"
        )
    if validation.num_classes < 2:
        raise DataError(
            f"{config.dataset}: there is one class only, {validation.class_names[0]}, so there is "
            f"nothing to tell apart; check data.root {config.root}"
        )
    if config.train_limit is not None and config.train_limit < len(train):
        chosen = spread_over_classes(train.labels)[: config.train_limit]
        train = train.subset(np.sort(chosen))
    return train, validation


def _open_datasets(config: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    mode = "L" if config.channels == 1 else "RGB"
    root = None if config.root is None else config.root.expanduser()
    family, _, name = config.dataset.partition("/")
    if family == "digits":
        return _digits(mode)
    if family == "hfds":
        return archives.hugging_face(root, mode, name)
    assert root is not None  # DataConfig has checked it
    if family == "wds":
        return archives.tar_shards(root, mode, name)
    if family in ("cifar10", "cifar100"):
        return archives.cifar(root, mode, family)
    return _IN_FOLDERS[family](root, mode)


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
        f"{contents(root)}; set data.root to the folder of the idx files"
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


_IN_FOLDERS = {
    "fashion_mnist": _fashion_mnist,
    "image_folder": folders.image_folder,
    "tiny_imagenet": folders.tiny_imagenet,
    "imagenet": folders.imagenet,
    "imagenet_r": folders.evaluation_folder,
    "imagenet_a": folders.evaluation_folder,
    "tiny_imagenet_r": folders.evaluation_folder,
    "cub": archives.cub,
}
