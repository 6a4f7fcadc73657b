"""Image sets in folders: one folder per class, and the layouts of ImageNet and its relatives.

Classes are the names of their folders, in alphabetical order; for ImageNet's relatives these are
WordNet ids, which is how an out-of-distribution set finds its classes among a network's. Hidden
files and folders do not count.
"""

import csv
import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from m2mkd.errors import DataError
from m2mkd.train.image_set import FileImages, ImageDataset, contents, some

_KAGGLE = Path("ILSVRC") / "Data" / "CLS-LOC"
_SOLUTION = "LOC_val_solution.csv"
_OTHER_NAMES = ("validation", "valid", "test", "Val", "VAL")


def image_folder(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    """`train/CLASS/*` and `val/CLASS/*`, with the same classes in both."""
    train = class_folders(root, "train", mode)
    validation = class_folders(root, "val", mode)
    if train.class_names != validation.class_names:
        only_train = set(train.class_names) - set(validation.class_names)
        only_val = set(validation.class_names) - set(train.class_names)
        raise DataError(
            f"image_folder: {root}/train and {root}/val must hold the same class folders; "
            f"only in train: {some(only_train)}; only in val: {some(only_val)}"
            f"{_looks_like(root)}"
        )
    return train, validation


def tiny_imagenet(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    """Tiny-ImageNet as it is distributed, or with its validation images sorted into class folders.

    The original has `train/WNID/images/*` and `val/images/*`, whose classes are in
    `val/val_annotations.txt`: file name, WordNet id and a box, separated by tabs.
    """
    annotations = root / "val" / "val_annotations.txt"
    folder = root / "val" / "images"
    if not (folder.is_dir() and _holds_images(folder)):
        return image_folder(root, mode)
    if not annotations.is_file():
        raise DataError(
            f"tiny_imagenet: {annotations} is missing, so the classes of {folder} are not known; "
            "copy it from the original archive"
        )
    train = class_folders(root, "train", mode)
    files = []
    for number, line in enumerate(_lines(annotations), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(
                f"tiny_imagenet: {annotations} line {number} is not 'FILE<tab>WNID<tab>box': {line}"
            )
        files.append((fields[0], fields[1].strip()))
    return train, _labelled(files, folder, train.class_names, mode, annotations)


def imagenet(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    """ImageNet-1k: `train/WNID/*` and `val/WNID/*`, or as Kaggle packs it.

    Kaggle's has `ILSVRC/Data/CLS-LOC/{train/WNID/*,val/*}`, and the classes of the validation
    images in `LOC_val_solution.csv`: image id, WordNet id and box. A `val` that was never sorted
    is also read beside that file.
    """
    base = root / _KAGGLE if (root / _KAGGLE).is_dir() else root
    if not _is_flat(base / "val"):
        return image_folder(base, mode)
    solution = next((f / _SOLUTION for f in (root, base) if (f / _SOLUTION).is_file()), None)
    if solution is None:
        raise DataError(
            f"imagenet: {base}/val holds images that are not in class folders. This looks like "
            f"ImageNet before its validation images were sorted: put Kaggle's {_SOLUTION} into "
            f"{root}, or move every image into the folder of its WordNet id"
        )
    train = class_folders(base, "train", mode)
    files = []
    for row in csv.reader(_lines(solution)[1:]):
        if len(row) != 2 or not row[1].strip():
            raise DataError(f"imagenet: {solution} has a row that is not 'image,WNID box': {row}")
        files.append((f"{row[0]}.JPEG", row[1].split()[0]))
    return train, _labelled(files, base / "val", train.class_names, mode, solution)


def evaluation_folder(root: Path, mode: str) -> tuple[ImageDataset, ImageDataset]:
    """`CLASS/*` right in the root, for evaluation only: ImageNet-R, ImageNet-A, Tiny-ImageNet-R.

    Returns:
        A training set without images, and the images.
    """
    validation = class_folders(root, "", mode)
    return validation.subset(np.arange(0)), validation


def class_folders(root: Path, split: str, mode: str) -> ImageDataset:
    """The images of one split, one folder per class.

    Raises:
        DataError: No such folder, no classes in it, or a class without images; where the layout
            is that of a known data set, the message says what to do.
    """
    folder = root / split
    if not folder.is_dir():
        layout = f"{root}/train/CLASS/* and {root}/val/CLASS/*" if split else f"{root}/CLASS/*"
        raise DataError(
            f"image_folder: expected {layout}, but there is no folder {folder}; "
            f"{contents(root)}{_looks_like(root)}"
        )
    class_names = _class_names(folder)
    if not class_names:
        raise DataError(
            f"image_folder: expected one folder of images per class in {folder}; "
            f"{contents(folder)}{_looks_like(root)}"
        )
    skipped = len(str(folder))

    def is_image(path: str) -> bool:
        # A Mac's archives have a ._1.jpg for every 1.jpg, notebooks copies in .ipynb_checkpoints.
        return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[skipped:]

    class_to_index = {name: index for index, name in enumerate(class_names)}
    samples = make_dataset(folder, class_to_index, is_valid_file=is_image, allow_empty=True)
    labels = np.array([label for _, label in samples], dtype=np.int64)
    images_per_class = np.bincount(labels, minlength=len(class_names))
    empty = [class_names[index] for index in np.flatnonzero(images_per_class == 0)]
    for name in empty:
        os.listdir(folder / name)  # make_dataset passes over what it may not list
    if empty:
        raise DataError(
            f"image_folder: no image files ({', '.join(IMG_EXTENSIONS)}) in {folder} for "
            f"class {some(empty)}; add images or remove the folder{_looks_like(root)}"
        )
    images = FileImages([path for path, _ in samples], mode=mode)
    return ImageDataset(images, labels, class_names)


def _class_names(folder: Path) -> list[str]:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    broken = [entry.name for entry in entries if entry.is_symlink() and not entry.exists()]
    if broken:
        raise DataError(
            f"image_folder: {folder} holds links that lead nowhere: {some(broken)}; mend or remove "
            "them"
        )
    names = sorted(entry.name for entry in entries if entry.is_dir())
    unnamed = [ascii(name) for name in names if name.encode("utf-8", "ignore") != os.fsencode(name)]
    if unnamed:
        raise DataError(
            f"image_folder: {folder} has class folders whose names are not UTF-8: {some(unnamed)}; "
            "rename them"
        )
    return names


def _labelled(
    files: list[tuple[str, str]], folder: Path, class_names: list[str], mode: str, source: Path
) -> ImageDataset:
    """Files of a folder with the names of their classes, which must be among the known ones."""
    position = {name: index for index, name in enumerate(class_names)}
    if not files:
        raise DataError(f"{source} names no image")
    if foreign := {name for _, name in files} - set(class_names):
        raise DataError(f"{source} names classes without a training folder: {some(foreign)}")
    if missing := {file for file, _ in files} - set(os.listdir(folder)):
        raise DataError(
            f"{source} names images that are not in {folder}: {some(missing)}; put all of them "
            "there, or all into folders of their classes"
        )
    labels = np.array([position[name] for _, name in files], dtype=np.int64)
    return ImageDataset(
        FileImages([str(folder / file) for file, _ in files], mode=mode), labels, class_names
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _is_flat(folder: Path) -> bool:
    """Whether a folder holds images themselves, and not folders."""
    return folder.is_dir() and _holds_images(folder) and not _folders(folder)


def _holds_images(folder: Path) -> bool:
    return any(
        entry.suffix.lower() in IMG_EXTENSIONS and not entry.name.startswith(".")
        for entry in folder.iterdir()
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _looks_like(root: Path) -> str:
    """What to do about the layout of a known data set, as the end of a message; else nothing."""
    if not root.is_dir():
        return ""
    folders = {folder.name: folder for folder in _folders(root)}
    val = root / "val"
    other = next((name for name in _OTHER_NAMES if name in folders), None)
    nested = next((f for f in folders.values() if (f / "train").is_dir()), None)
    is_tiny = (root / "wnids.txt").is_file() or (val / "val_annotations.txt").is_file()
    if is_tiny and (val / "images").is_dir():
        hint = "Tiny-ImageNet in its original layout: set data.dataset: tiny_imagenet"
    elif is_tiny and _is_flat(val):
        hint = f"Tiny-ImageNet with its validation images moved: put them back into {val}/images"
    elif (root / _KAGGLE).is_dir() or _is_flat(val):
        hint = "ImageNet before its validation images were sorted: set data.dataset: imagenet"
    elif "cifar-100-python" in folders or "cifar-10-batches-py" in folders:
        kind = "cifar100" if "cifar-100-python" in folders else "cifar10"
        hint = f"CIFAR in its original form: set data.dataset: {kind}"
    elif "CUB_200_2011" in folders or (root / "train_test_split.txt").is_file():
        hint = "CUB-200-2011 in its original layout: set data.dataset: cub"
    elif any(root.glob("*train*.tar")):
        hint = "WebDataset shards: set data.dataset: wds/"
    elif "train" in folders and not val.exists() and other:
        hint = f"a data set whose validation images are in {other}: rename that folder to val"
    elif nested is not None and "train" not in folders:
        hint = f"the folder above a data set: set data.root: {nested}"
    elif "train" not in folders and folders and all(map(_holds_images, folders.values())):
        hint = (
            "class folders that are not split into train and val: split them, or, to evaluate "
            "only, set data.dataset: imagenet_r (also for ImageNet-A and Tiny-ImageNet-R)"
        )
    else:
        return ""
    return f". This looks like {hint}"
