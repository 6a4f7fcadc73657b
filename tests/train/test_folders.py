"""Image folders of ImageNet and its relatives, and what wrong layouts are told."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from tiny import VALUES

from m2mkd.errors import ConfigError, DataError
from m2mkd.recipe import DataConfig, load_recipe, validate
from m2mkd.train.datasets import load_datasets
from m2mkd.train.image_set import ImageDataset

WNIDS = ("n01443537", "n01629819", "n02124075")


def picture(path: Path, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)


def load(dataset: str, root: Path) -> tuple[ImageDataset, ImageDataset]:
    return load_datasets(DataConfig(dataset=dataset, root=root, image_size=8))


def labelled(images: ImageDataset) -> list[tuple[str, str]]:
    """Name of every file with that of its class."""
    return [
        (Path(images.describe(i)).name, images.class_names[images.label(i)])
        for i in range(len(images))
    ]


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """A small tree in Tiny-ImageNet's original layout."""
    root = tmp_path / "tiny-imagenet-200"
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("n01443537\tgoldfish\n")
    for wnid in WNIDS:
        picture(root / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t7\t7\n")
    lines = []
    for i, wnid in enumerate((WNIDS[2], WNIDS[0])):
        picture(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(root / "test" / "images" / "test_0.JPEG")
    return root


def test_tiny_imagenet_is_read_as_it_is_distributed(tiny_imagenet: Path) -> None:
    train, validation = load("tiny_imagenet", tiny_imagenet)
    assert train.class_names == validation.class_names == list(WNIDS)
    assert labelled(train) == [(f"{wnid}_0.JPEG", wnid) for wnid in WNIDS]
    assert labelled(validation) == [("val_0.JPEG", WNIDS[2]), ("val_1.JPEG", WNIDS[0])]
    assert validation.image(0).size == (8, 8)


def sort_validation(root: Path, *, leave: int) -> None:
    """Moves the validation images into folders of their classes, as users do, but for some."""
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    for line in lines[leave:]:
        file, wnid = line.split("\t")[:2]
        (root / "val" / wnid).mkdir()
        (root / "val" / "images" / file).rename(root / "val" / wnid / file)
    if not leave:
        (root / "val" / "images").rmdir()


def test_tiny_imagenet_may_have_its_validation_images_sorted(tiny_imagenet: Path) -> None:
    sort_validation(tiny_imagenet, leave=0)
    picture(tiny_imagenet / "val" / WNIDS[1] / "val_2.JPEG")
    _, validation = load("tiny_imagenet", tiny_imagenet)
    assert labelled(validation) == [
        ("val_1.JPEG", WNIDS[0]), ("val_2.JPEG", WNIDS[1]), ("val_0.JPEG", WNIDS[2])
    ]  # fmt: skip


def test_sorted_validation_images_must_have_the_training_classes(tiny_imagenet: Path) -> None:
    sort_validation(tiny_imagenet, leave=0)
    with pytest.raises(DataError, match=f"same class folders; only in train: {WNIDS[1]}") as caught:
        load("tiny_imagenet", tiny_imagenet)
    assert "This looks like" not in str(caught.value)


def test_half_sorted_validation_images_are_reported(tiny_imagenet: Path) -> None:
    sort_validation(tiny_imagenet, leave=1)
    with pytest.raises(DataError, match=r"images that are not in .*val/images: val_1\.JPEG; put"):
        load("tiny_imagenet", tiny_imagenet)


def test_tiny_imagenet_without_its_annotations_says_what_is_missing(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt is missing"):
        load("tiny_imagenet", tiny_imagenet)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_0.JPEG n01443537\n", "line 1 is not"),
        ("val_0.JPEG\tn09999999\t0\t0\t1\t1\n", "without a training folder: n09999999"),
        ("\n", "names no image"),
    ],
)
def test_annotations_that_make_no_sense_are_reported(
    tiny_imagenet: Path, text: str, words: str
) -> None:
    (tiny_imagenet / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        load("tiny_imagenet", tiny_imagenet)


def test_tiny_imagenet_given_as_an_image_folder_is_recognised(tiny_imagenet: Path) -> None:
    words = r"This looks like Tiny-ImageNet in its original layout: set data\.dataset: tiny_imagen"
    with pytest.raises(DataError, match=words):
        load("image_folder", tiny_imagenet)


def test_the_folder_above_a_data_set_is_recognised(tiny_imagenet: Path) -> None:
    for dataset in ("image_folder", "tiny_imagenet"):
        with pytest.raises(DataError, match=f"set data.root: {tiny_imagenet}"):
            load(dataset, tiny_imagenet.parent)


def imagenet(base: Path) -> Path:
    for wnid in WNIDS:
        picture(base / "train" / wnid / f"{wnid}_1.JPEG")
    for i in range(2):
        picture(base / "val" / f"ILSVRC2012_val_0000000{i}.JPEG")
    return base


@pytest.mark.parametrize("inside", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_is_read_as_kaggle_packs_it(tmp_path: Path, inside: str) -> None:
    imagenet(tmp_path / inside)
    (tmp_path / inside / "val" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        f"ILSVRC2012_val_00000001,{WNIDS[1]} 85 1 499 272 {WNIDS[1]} 3 4 5 6\n"
        f"ILSVRC2012_val_00000000,{WNIDS[2]} 1 2 3 4 \n"
    )
    _, validation = load("imagenet", tmp_path)
    assert labelled(validation) == [
        ("ILSVRC2012_val_00000001.JPEG", WNIDS[1]),
        ("ILSVRC2012_val_00000000.JPEG", WNIDS[2]),
    ]
    assert validation.image(1).size == (8, 8)


def test_imagenet_in_class_folders_is_an_image_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in WNIDS:
            picture(tmp_path / split / wnid / "x.JPEG")
    train, validation = load("imagenet", tmp_path)
    assert train.class_names == list(WNIDS) and len(validation) == 3


def test_imagenet_before_sorting_is_recognised(tmp_path: Path) -> None:
    imagenet(tmp_path)
    with pytest.raises(DataError, match="ImageNet before its validation images were sorted"):
        load("image_folder", tmp_path)
    with pytest.raises(DataError, match=r"put Kaggle's LOC_val_solution\.csv into"):
        load("imagenet", tmp_path)


@pytest.mark.parametrize("dataset", ["imagenet_r", "imagenet_a", "tiny_imagenet_r"])
def test_out_of_distribution_sets_hold_no_training_images(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "README.txt").write_text("list of classes")
    for wnid in WNIDS[:2]:
        picture(tmp_path / wnid / "art_0.jpg")
    train, validation = load(dataset, tmp_path)
    assert len(train) == 0 and labelled(validation) == [("art_0.jpg", w) for w in WNIDS[:2]]
    assert train.class_names == validation.class_names == list(WNIDS[:2])


def test_a_missing_evaluation_set_is_told_its_own_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"expected {tmp_path}/gone/CLASS/\\*, but there is no"):
        load("imagenet_a", tmp_path / "gone")


def test_no_recipe_trains_on_an_evaluation_set() -> None:
    values: dict[str, Any] = {**VALUES, "data": {**VALUES["data"], "dataset": "imagenet_r"}}
    values["data"]["root"] = "/somewhere"
    with pytest.raises(ConfigError, match="has no training images; evaluate a run on it with"):
        validate(values, source="tiny")


def layout(root: Path, kind: str) -> None:
    if kind == "class folders":
        for name in ("cat", "dog"):
            picture(root / name / "1.png")
    elif kind == "other name":
        for name in ("cat", "dog"):
            picture(root / "train" / name / "1.png")
            picture(root / "valid" / name / "1.png")
    elif kind == "cifar":
        (root / "cifar-100-python").mkdir(parents=True)
    elif kind == "cub":
        (root / "CUB_200_2011").mkdir(parents=True)
    elif kind == "shards":
        root.mkdir(exist_ok=True)
        (root / "birds-train-000.tar").touch()


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("class folders", "class folders that are not split into train and val"),
        ("other name", "validation images are in valid: rename that folder to val"),
        ("cifar", "set data.dataset: cifar100"),
        ("cub", "set data.dataset: cub"),
        ("shards", "set data.dataset: wds/"),
    ],
)
def test_other_layouts_are_recognised(tmp_path: Path, kind: str, hint: str) -> None:
    layout(tmp_path / "data", kind)
    with pytest.raises(DataError, match=hint):
        load("image_folder", tmp_path / "data")


def test_a_data_set_nobody_knows_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny_imagenet'"):
        load_recipe("quickstart", ("data.dataset=tiny-imagenet",))
    with pytest.raises(ConfigError, match="hfds/NAME"):
        load_recipe("quickstart", ("data.dataset=hfds/",))
