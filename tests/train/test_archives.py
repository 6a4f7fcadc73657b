"""CIFAR, CUB, tar shards and Hugging Face data sets; repeated augmentation."""

import io
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_recipe

from m2mkd.errors import ConfigError, DataError
from m2mkd.recipe import DataConfig
from m2mkd.train.data import ImageData
from m2mkd.train.datasets import load_datasets
from m2mkd.train.image_set import ImageDataset


def load(dataset: str, root: Path | None) -> tuple[ImageDataset, ImageDataset]:
    return load_datasets(DataConfig(dataset=dataset, root=root, image_size=8))


def encoded(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shade_of(images: ImageDataset, index: int) -> int:
    return int(np.asarray(images.image(index))[0, 0, 0])


@pytest.mark.parametrize(("kind", "source"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_is_read_from_its_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: type
) -> None:
    folder = tmp_path / source.base_folder
    folder.mkdir()
    key = "labels" if kind == "cifar10" else "fine_labels"
    names = [str(i) for i in range(10)]
    meta = {"label_names": names} if kind == "cifar10" else {"fine_label_names": names}
    lists = [*source.train_list, *source.test_list]
    for number, (name, _) in enumerate(lists):
        pixels = np.full((2, 3072), 10 * number, np.uint8)
        content = {"data": pixels, key: [number % 10, 1]}
        (folder / name).write_bytes(ForkingPickler.dumps(content))
    (folder / source.meta["filename"]).write_bytes(ForkingPickler.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    train, validation = load(kind, tmp_path)
    assert len(train) == 2 * len(source.train_list) and len(validation) == 2
    assert train.class_names == names
    assert shade_of(validation, 0) == 10 * (len(lists) - 1)
    assert validation.labels.tolist() == [(len(lists) - 1) % 10, 1]


def test_cifar_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cifar100: expected the published files in .*unpack cifar"
    ):
        load("cifar100", tmp_path)


def cub(root: Path) -> Path:
    base = root / "CUB_200_2011"
    paths = ["001.Albatross/a.jpg", "002.Auklet/b.jpg", "001.Albatross/c.jpg"]
    for i, path in enumerate(paths):
        (base / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (base / "images" / path).write_bytes(encoded(10 * i))
    (base / "images.txt").write_text("".join(f"{i + 1} {p}\n" for i, p in enumerate(paths)))
    (base / "classes.txt").write_text("1 001.Albatross\n2 002.Auklet\n")
    (base / "image_class_labels.txt").write_text("1 1\n2 2\n3 1\n")
    (base / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n")
    return base


def test_cub_is_split_by_its_own_list(tmp_path: Path) -> None:
    cub(tmp_path)
    for root in (tmp_path, tmp_path / "CUB_200_2011"):
        train, validation = load("cub", root)
        assert train.class_names == ["001.Albatross", "002.Auklet"]
        assert train.labels.tolist() == [0] and validation.labels.tolist() == [1, 0]
        assert [shade_of(validation, i) for i in range(2)] == [10, 20]


def test_lists_of_cub_that_disagree_are_reported(tmp_path: Path) -> None:
    (cub(tmp_path) / "train_test_split.txt").write_text("1 1\n2 0\n")
    with pytest.raises(DataError, match="do not name the same images"):
        load("cub", tmp_path)
    (tmp_path / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*classes\.txt"):
        load("cub", tmp_path)


def test_a_split_of_cub_without_images_is_reported(tmp_path: Path) -> None:
    base = cub(tmp_path)
    (base / "train_test_split.txt").write_text("1 1\n2 1\n3 1\n")
    with pytest.raises(DataError, match="3 training and 0 validation images; both are needed"):
        load("cub", tmp_path)
    for name in ("images", "image_class_labels", "train_test_split"):
        (base / f"{name}.txt").write_text("")
    with pytest.raises(DataError, match="0 training and 0 validation images"):
        load("cub", tmp_path)
    (base / "images").rename(base / "pictures")
    with pytest.raises(DataError, match=r"there is no folder .*CUB_200_2011/images; .* pictures"):
        load("cub", tmp_path)


def shard(path: Path, samples: list[tuple[str, int | None, bytes | None]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, label, image in samples:
            parts = {"cls": None if label is None else str(label).encode(), "png": image}
            for ending, content in parts.items():
                if content is not None:
                    item = tarfile.TarInfo(f"{key}.{ending}")
                    item.size = len(content)
                    archive.addfile(item, io.BytesIO(content))


def shards(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    shard(root / "b-train-000.tar", [("a/0", 0, encoded(0)), ("a/1", 2, encoded(50))])
    shard(root / "b-train-001.tar", [("a/2", 1, encoded(100))])
    shard(root / "b-val-000.tar", [("v/0", 1, encoded(200))])
    return root


def test_tar_shards_are_read_in_place(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    for dataset in ("wds/", "wds/b-"):
        train, validation = load(dataset, root)
        assert train.labels.tolist() == [0, 2, 1] and train.class_names == ["0", "1", "2"]
        assert [shade_of(train, i) for i in (2, 0, 1)] == [100, 0, 50]
        assert shade_of(validation, 0) == 200
    assert train.describe(2) == f"{root}/b-train-001.tar:a/2.png"


def test_class_names_of_shards_come_from_a_file(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    assert load("wds/", root)[0].class_names == ["ant", "bee", "cat"]
    (root / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="class 2 is above the 2 known classes"):
        load("wds/", root)


def test_wrong_shards_are_reported(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    with pytest.raises(DataError, match=r"wds/c-: no shards .*c-\*train\*\.tar"):
        load("wds/c-", root)
    shard(root / "b-train-002.tar", [("a/9", None, encoded(1))])
    with pytest.raises(DataError, match=r"b-train-002\.tar has samples without an image or"):
        load("wds/", root)
    (root / "b-train-002.tar").write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"cannot read shard .*b-train-002\.tar"):
        load("wds/", root)


def test_what_is_no_class_in_a_shard_is_named(tmp_path: Path) -> None:
    root = shards(tmp_path)
    shard(root / "b-train-002.tar", [("a/3", -1, encoded(0))])
    with pytest.raises(DataError, match=r"b-train-002\.tar: a/3\.cls holds b'-1', which is no cla"):
        load("wds/b-", root)
    (root / "b-train-002.tar").unlink()
    (root / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"cannot read .*classes\.txt"):
        load("wds/b-", root)


def test_a_damaged_image_in_a_shard_is_named(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    shard(root / "b-val-000.tar", [("v/0", 1, b"no image")])
    _, validation = load("wds/", root)
    with pytest.raises(DataError, match=r"b-val-000\.tar:v/0\.png: it is empty or in no known"):
        validation.image(0)


def test_hugging_face_data_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'm2mkd\[hfds\]'"):
        load("hfds/somebody/something", None)


def test_hugging_face_data_are_read_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "pets"
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            path = folder / split / name / "1.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(100 * i + (split == "test")))
    train, validation = load(f"hfds/{folder}", tmp_path / "cache")
    assert train.class_names == ["cat", "dog"] and train.labels.tolist() == [0, 1]
    assert [shade_of(validation, i) for i in range(2)] == [1, 101]
    with pytest.raises(DataError, match="cannot be loaded"):
        load(f"hfds/{tmp_path / 'nothing'}", tmp_path / "cache")


def test_repeated_augmentation_shows_fewer_images_more_often_and_differently() -> None:
    augment = {"crop_scale": [0.3, 0.6], "repeats": 3}
    data = ImageData(tiny_recipe(data__augment=augment).data, seed=0)
    once = ImageData(tiny_recipe(data__augment={"crop_scale": [0.3, 0.6]}).data, seed=0)
    assert data.steps_per_epoch == once.steps_per_epoch == 5
    images = torch.cat([images for images, _ in data.train_batches(0)])
    labels = torch.cat([labels for _, labels in data.train_batches(0)])
    assert len(images) == 160
    # Copies are side by side: three of a kind, of the same class, each seen otherwise.
    triples = images[:159].unflatten(0, (53, 3))
    assert (labels[:159].unflatten(0, (53, 3)).diff(dim=1) == 0).all()
    differ = (triples[:, 0] != triples[:, 1]).flatten(1).any(dim=1)
    assert differ.float().mean() > 0.9
    # The first copies are the images of an epoch without repeats.
    plain = torch.cat([images for images, _ in once.train_batches(0)])
    assert torch.equal(triples[:, 0], plain[:53])
    again = torch.cat([images for images, _ in data.train_batches(0, 2)])
    assert torch.equal(again, images[64:])
