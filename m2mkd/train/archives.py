"""Image sets that are not folders of images: CIFAR, CUB, tar shards, Hugging Face data sets."""

import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from m2mkd.errors import ConfigError, DataError
from m2mkd.train.image_set import (
    ArrayImages,
    FileImages,
    ImageDataset,
    TableImages,
    TarImages,
    TarMember,
    contents,
    some,
)

_VALIDATION_NAMES = ("validation", "val", "valid", "test")


def cifar(root: Path, mode: str, kind: str) -> tuple[ImageDataset, ImageDataset]:
    """CIFAR-10 or CIFAR-100 as distributed for Python, read by torchvision; test images validate.

    Raises:
        DataError: The files are not there, or are not the published ones.
    """
    source: Any = CIFAR10 if kind == "cifar10" else CIFAR100
    folder = source.base_folder
    splits = []
    for is_training in (True, False):
        try:
            with warnings.catch_warnings():
                # torchvision's reader has an argument of an old NumPy type.
                warnings.simplefilter("ignore")
                found = source(root, train=is_training)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{kind}: expected the published files in {root}/{folder} ({error}); "
                f"{contents(root)}; unpack {source.filename} there"
            ) from None
        images = ArrayImages(found.data, mode=mode, source=f"{root}/{folder}")
        labels = np.array(found.targets, dtype=np.int64)
        splits.append(ImageDataset(images, labels, list(found.classes)))
    return splits[0], splits[1]


def cub(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    """CUB-200-2011 as distributed; its test images validate.

    Files of one line per image name path, class and split: `images.txt`, `image_class_labels.txt`,
    `train_test_split.txt`; `classes.txt` names the classes.

    Raises:
        DataError: A file is missing or they disagree.
    """
    base = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    paths = _numbered(base / "images.txt", root)
    classes = _numbered(base / "classes.txt", root)
    labels = _numbered(base / "image_class_labels.txt", root)
    training = _numbered(base / "train_test_split.txt", root)
    if not paths.keys() == labels.keys() == training.keys():
        raise DataError(f"cub: the lists of images in {base} do not name the same images")
    names = list(classes.values())
    position = {number: index for index, number in enumerate(classes)}
    foreign = set(labels.values()) - set(classes)
    if foreign:
        raise DataError(f"cub: {base}/classes.txt lacks class {some(foreign)}")
    if not (base / "images").is_dir():
        raise DataError(f"cub: there is no folder {base}/images; {contents(base)}")
    images = FileImages([str(base / "images" / path) for path in paths.values()], mode=mode)
    whole = ImageDataset(
        images, np.array([position[labels[key]] for key in paths], dtype=np.int64), names
    )
    is_training = np.array([training[key] == "1" for key in paths], dtype=bool)
    return whole.subset(np.flatnonzero(is_training)), whole.subset(np.flatnonzero(~is_training))


def _numbered(path: Path, root: Path) -> dict[str, str]:
    """Lines 'NUMBER VALUE' as a mapping, in their order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split(maxsplit=1) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cub: cannot read {path}: {error}; {contents(root)}") from None
    except ValueError:
        raise DataError(f"cub: {path} has a line that is not 'NUMBER VALUE'") from None


def tar_shards(root: Path, mode: str, prefix: str) -> tuple[ImageDataset, ImageDataset]:
    """WebDataset shards: `PREFIX*train*.tar` and `PREFIX*val*.tar` (or `*test*.tar`).

    A sample is the files of one name, its image (`.jpg`, `.png`, ...) and its class number
    (`.cls`). Images are read from their places in the archives, in any order, so a resumed run
    meets the batches of an uninterrupted one; reading in archive order, as streams do, would not
    allow that. Class names come from `classes.txt` in the root, one a line, if it is there.

    Raises:
        DataError: No shards, a damaged one, or a sample without image or class.
    """
    if not root.is_dir():
        raise DataError(f"wds: {contents(root)}; set data.root to the folder of the tar shards")
    train = sorted(root.glob(f"{prefix}*train*.tar"))
    held = [sorted(root.glob(f"{prefix}*{name}*.tar")) for name in ("val", "test")]
    validation = held[0] or held[1]
    if not train or not validation:
        missing = "train" if not train else "val"
        raise DataError(f"wds/{prefix}: no shards {root}/{prefix}*{missing}*.tar; {contents(root)}")
    members = [_samples(train), _samples(validation)]
    labels = [np.array([label for _, label in found], dtype=np.int64) for found in members]
    count = 1 + int(labels[0].max())
    file = root / "classes.txt"
    names = [str(i) for i in range(count)]
    if file.is_file():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"wds: cannot read {file}: {error}") from None
        names = [line.strip() for line in lines if line]
    most = int(max(part.max() for part in labels))
    if most >= len(names):
        raise DataError(f"wds/{prefix}: class {most} is above the {len(names)} known classes")
    sets = [
        ImageDataset(TarImages([m for m, _ in found], mode=mode), part, names)
        for found, part in zip(members, labels, strict=True)
    ]
    return sets[0], sets[1]


def _samples(shards: list[Path]) -> list[tuple[TarMember, int]]:
    """Every sample of some shards, in their order."""
    found = []
    for shard in shards:
        images: dict[str, TarMember] = {}
        classes: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for item in archive:
                    if not item.isfile():
                        continue
                    folder, _, file = item.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    key = f"{folder}/{stem}"
                    if f".{ending.lower()}" in IMG_EXTENSIONS:
                        images[key] = TarMember(str(shard), item.offset_data, item.size, item.name)
                    elif ending == "cls":
                        content = archive.extractfile(item)
                        classes[key] = _class_number(content.read() if content else b"", item.name)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"wds: cannot read shard {shard}: {error}") from None
        if images.keys() != classes.keys() or not images:
            odd = images.keys() ^ classes.keys()
            raise DataError(
                f"wds: shard {shard} has samples without an image or without a .cls: {some(odd)}"
            )
        found += [(member, classes[key]) for key, member in images.items()]
    return found


def _class_number(content: bytes, name: str) -> int:
    if not content.strip().isdigit():
        raise ValueError(f"{name} holds {content[:20]!r}, which is no class number")
    return int(content)


def hugging_face(root: Path | None, mode: str, name: str) -> tuple[ImageDataset, ImageDataset]:
    """A data set of the Hugging Face hub, or a local folder that `datasets.load_dataset` reads.

    Images are the first image column, classes the first column of class labels; split `train`
    trains, and `validation`, `val`, `valid` or `test` validates, whichever is there first.

    Args:
        root: Where downloads are kept; None: the library's own place.
        mode: L or RGB.
        name: Name on the hub, or path of a folder.

    Raises:
        ConfigError: The library is not installed.
        DataError: No such data set, split or column.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"data.dataset hfds/{name} needs the package datasets; run `pip install 'm2mkd[hfds]'`"
        ) from None
    try:
        splits = datasets.load_dataset(name, cache_dir=None if root is None else str(root))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"hfds/{name} cannot be loaded: {' '.join(str(error).split())}") from None
    held = next((split for split in _VALIDATION_NAMES if split in splits), None)
    if "train" not in splits or held is None:
        raise DataError(
            f"hfds/{name} has the splits {some(splits)}; train and one of "
            f"{', '.join(_VALIDATION_NAMES)} are needed"
        )
    features = splits["train"].features
    image = _column(features, datasets.Image, name, "images")
    label = _column(features, datasets.ClassLabel, name, "class labels")
    sets = []
    for split in ("train", held):
        table = splits[split].cast_column(image, datasets.Image(decode=False))
        labels = np.array(table[label], dtype=np.int64)
        images = TableImages(
            table.select_columns([image]), image, mode=mode, source=f"hfds/{name} {split}"
        )
        sets.append(ImageDataset(images, labels, list(features[label].names)))
    return sets[0], sets[1]


def _column(features: Any, kind: Any, name: str, what: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if not found:
        raise DataError(f"hfds/{name} has no column of {what}; its columns are {some(features)}")
    return str(found[0])
