"""Data sets: where images and labels come from, and what is said when they cannot be had."""

import gzip
import os
import shutil
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd.errors import DataError
from m2mkd.recipe import DataConfig
from m2mkd.train.datasets import load_datasets, spread_over_classes
from m2mkd.train.image_set import ImageDataset, read_image

NUM_TRAIN, NUM_VALIDATION = 30, 20


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(np.uint8).tobytes()


def fashion_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(count)
    return random.randint(0, 256, (count, 6, 5), dtype=np.uint8), np.arange(count) % 10


def write_fashion(folder: Path, *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", NUM_TRAIN), ("t10k", NUM_VALIDATION)):
        images, labels = fashion_arrays(count)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_images(root: Path, *, classes=("ant", "bee"), per_class=3, size=(9, 7)) -> Path:
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def load(dataset: str, root: Path | None = None, **options) -> tuple[ImageDataset, ImageDataset]:
    return load_datasets(DataConfig(dataset=dataset, root=root, **options))


def message_of(dataset: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(dataset, root)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- digits


def test_digits_are_split_into_500_validation_images_and_the_rest() -> None:
    train, validation = load("digits", channels=1)
    assert (len(train), len(validation)) == (1297, 500)
    assert train.class_names == validation.class_names == [str(digit) for digit in range(10)]
    assert train.num_classes == 10


def test_no_digit_is_in_both_splits() -> None:
    train, validation = load("digits")
    names = {train.describe(i) for i in range(1297)} | {validation.describe(i) for i in range(500)}
    assert len(names) == 1797


def test_the_digits_split_keeps_the_shares_of_the_classes() -> None:
    _, validation = load("digits")
    per_class = np.bincount(validation.labels)
    assert per_class.min() >= 48 and per_class.max() <= 51  # 174 to 183 of 1797 each


def test_the_digits_split_never_moves() -> None:
    _, validation = load("digits")
    assert [validation.describe(index) for index in (0, 1, 250, 499)] == [
        "digits image 10",
        "digits image 21",
        "digits image 978",
        "digits image 1791",
    ]


def test_digits_use_the_whole_range_of_a_byte() -> None:
    train, _ = load("digits", channels=1)
    values = np.unique([np.asarray(train.image(index)) for index in range(50)])
    assert values.tolist() == [round(level * 255 / 16) for level in range(17)]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_digits_come_in_the_mode_the_channels_ask_for(channels: int, mode: str) -> None:
    train, _ = load("digits", channels=channels)
    assert (train.image(0).mode, train.image(0).size) == (mode, (8, 8))


# --- Fashion-MNIST


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"], ids=["in root", "torchvision layout"])
def test_idx_files_are_read_from_both_layouts(tmp_path: Path, folder: str, zipped: bool) -> None:
    write_fashion(tmp_path / folder, zipped=zipped)
    train, validation = load("fashion_mnist", tmp_path, channels=1)
    for split, count in ((train, NUM_TRAIN), (validation, NUM_VALIDATION)):
        images, labels = fashion_arrays(count)
        assert len(split) == count
        assert [split.label(index) for index in range(count)] == labels.tolist()
        for index in range(count):
            assert np.array_equal(np.asarray(split.image(index)), images[index])
    assert train.class_names[0] == "T-shirt/top" and train.class_names[9] == "Ankle boot"
    assert "train-images-idx3-ubyte" in train.describe(4) and "4" in train.describe(4)


def test_a_home_folder_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_fashion(tmp_path / "fashion")
    assert len(load("fashion_mnist", Path("~/fashion"))[0]) == NUM_TRAIN


def test_a_cut_idx_file_is_reported_with_expected_and_found_bytes(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    message = message_of("fashion_mnist", tmp_path)
    assert f"{path} is damaged: expected 916 bytes" in message and "found 500" in message


def test_an_idx_file_with_bytes_to_spare_is_reported(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"12")
    message = message_of("fashion_mnist", tmp_path)
    assert f"{path} is damaged: expected 28 bytes" in message and "found 30" in message


def test_a_cut_gzip_stream_is_reported_with_expected_and_found_bytes(tmp_path: Path) -> None:
    path = write_fashion(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:600])
    message = message_of("fashion_mnist", tmp_path)
    assert f"{path} is damaged: expected 916 bytes" in message and "found" in message


def test_a_gzip_stream_with_a_wrong_checksum_is_reported(tmp_path: Path) -> None:
    path = write_fashion(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    assert f"cannot read {path}" in message_of("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n", "89 50 4e 47"),
        (idx_bytes(np.zeros(3)), "00 00 08 01"),
        (b"\x00\x00\x0d\x03" + bytes(40), "00 00 0d 03"),
    ],
    ids=["empty", "png", "labels as images", "floats"],
)
def test_a_foreign_file_is_reported_with_its_first_bytes(
    tmp_path: Path, content: bytes, found: str
) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    message = message_of("fashion_mnist", tmp_path)
    assert str(path) in message and "00 00 08 03" in message and f"found {found}" in message


def test_an_idx_file_that_ends_in_its_header_is_reported(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:9])
    message = message_of("fashion_mnist", tmp_path)
    assert "expected 16 bytes or more, found 9" in message


def test_images_and_labels_must_be_equally_many(tmp_path: Path) -> None:
    (write_fashion(tmp_path) / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(7)))
    message = message_of("fashion_mnist", tmp_path)
    assert "holds 30 images" in message and "7 labels" in message


def test_labels_above_the_ten_classes_are_reported(tmp_path: Path) -> None:
    labels = np.arange(NUM_TRAIN)
    (write_fashion(tmp_path) / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert "holds label 29, but Fashion-MNIST has 10 classes" in message_of(
        "fashion_mnist", tmp_path
    )


def test_an_idx_file_without_images_is_reported(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(np.zeros((0, 6, 5))))
    assert f"{path} holds no pixels" in message_of("fashion_mnist", tmp_path)


def test_a_missing_idx_file_is_reported_with_what_is_there_instead(tmp_path: Path) -> None:
    (write_fashion(tmp_path) / "t10k-images-idx3-ubyte").unlink()
    message = message_of("fashion_mnist", tmp_path)
    assert "neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte.gz" in message
    assert "train-images-idx3-ubyte" in message and "set data.root" in message


@pytest.mark.parametrize("dataset", ["fashion_mnist", "image_folder"])
def test_a_missing_root_is_reported(tmp_path: Path, dataset: str) -> None:
    assert f"{tmp_path}/nowhere does not exist" in message_of(dataset, tmp_path / "nowhere")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "image_folder"])
def test_a_root_that_is_a_file_is_reported(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path}/file is not a folder" in message_of(dataset, tmp_path / "file")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "image_folder"])
def test_an_empty_root_is_reported(tmp_path: Path, dataset: str) -> None:
    assert f"{tmp_path} holds nothing" in message_of(dataset, tmp_path)


# --- folders of images


def test_class_folders_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    write_images(tmp_path, classes=("wasp", "ant"))
    train, validation = load("image_folder", tmp_path)
    assert train.class_names == validation.class_names == ["ant", "wasp"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.describe(5) == str(tmp_path / "train" / "wasp" / "2.png")
    with Image.open(train.describe(5)) as written:
        assert np.array_equal(np.asarray(train.image(5)), np.asarray(written))


@pytest.mark.parametrize("written_mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_files_of_any_mode_come_in_the_mode_the_channels_ask_for(
    tmp_path: Path, written_mode: str, channels: int, mode: str
) -> None:
    write_images(tmp_path)
    path = tmp_path / "train" / "ant" / "0.png"
    read_image(str(path), "RGB").convert(written_mode).save(path)
    train, _ = load("image_folder", tmp_path, channels=channels)
    assert (train.image(0).mode, train.image(0).size) == (mode, (9, 7))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_reported_with_what_is_there_instead(tmp_path: Path, split: str) -> None:
    write_images(tmp_path)
    (tmp_path / split).rename(tmp_path / "validation")
    message = message_of("image_folder", tmp_path)
    assert f"there is no folder {tmp_path}/{split}" in message and "validation" in message


def test_classes_that_differ_between_the_splits_are_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "images")
    message = message_of("image_folder", tmp_path)
    assert "only in train: bee" in message and "only in val: images" in message


def test_a_long_list_of_differing_classes_is_cut(tmp_path: Path) -> None:
    write_images(tmp_path, classes=[f"c{number}" for number in range(8)], per_class=1)
    for number in range(1, 8):
        (tmp_path / "val" / f"c{number}" / "0.png").unlink()
        (tmp_path / "val" / f"c{number}").rmdir()
    message = message_of("image_folder", tmp_path)
    assert "only in train: c1, c2, c3, c4, c5 and 2 more; only in val: nothing" in message


def test_a_split_without_class_folders_is_reported(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(b"x")
    message = message_of("image_folder", tmp_path)
    assert f"one folder of images per class in {tmp_path}/train" in message and "0.png" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_image_files_is_reported(tmp_path: Path, split: str) -> None:
    write_images(tmp_path)
    for path in (tmp_path / split / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    message = message_of("image_folder", tmp_path)
    assert "no image files (.jpg" in message and f"{split} for class bee" in message


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path)
    before = [len(images) for images in load("image_folder", tmp_path)]
    picture = next((tmp_path / "train" / "bee").iterdir()).read_bytes()
    for split in ("train", "val"):
        for folder in (tmp_path / split / "bee", tmp_path / split):
            (folder / ".ipynb_checkpoints").mkdir()
            (folder / ".ipynb_checkpoints" / "1.png").write_bytes(picture)
        (tmp_path / split / "bee" / "._1.png").write_bytes(b"not an image")
    assert [len(images) for images in load("image_folder", tmp_path)] == before


def test_a_class_that_is_a_broken_link_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "train" / "wasp").symlink_to(tmp_path / "gone")
    assert "links that lead nowhere: wasp" in message_of("image_folder", tmp_path)


def test_a_class_whose_name_is_no_text_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path)
    os.mkdir(os.fsencode(tmp_path / "train") + b"/\xff")
    assert r"not UTF-8: '\udcff'; rename" in message_of("image_folder", tmp_path)


def test_a_single_class_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path)
    for split in ("train", "val"):
        for folder in (tmp_path / split).iterdir():
            if folder.name != "bee":
                shutil.rmtree(folder)
    assert "one class only, bee" in message_of("image_folder", tmp_path)


def test_a_folder_that_the_system_will_not_open_is_reported(tmp_path: Path) -> None:
    message = message_of("imagenet", tmp_path / ("x" * 300))  # as a missing permission would be
    assert "imagenet: cannot read the data: " in message and "File name too long" in message


def damaged_files() -> dict[str, bytes]:
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 256, (40, 40, 3), dtype=np.uint8))
    files = {"empty.jpg": b"", "text.jpg": b"<html>404 not found</html>"}
    for name, kind in (("cut.jpg", "JPEG"), ("cut.png", "PNG"), ("cut.webp", "WEBP")):
        stream = BytesIO()
        image.save(stream, kind)
        files[name] = stream.getvalue()[: len(stream.getvalue()) // 2]
    stream = BytesIO()
    image.save(stream, "JPEG")
    files["nearly_whole.jpg"] = stream.getvalue()[:-40]
    files["header.ppm"] = b"P6\n4x 4\n255\n" + bytes(48)
    files["bomb.ppm"] = b"P6\n100000 100000\n255\n"
    stream = BytesIO()
    image.save(stream, "DDS")
    files["odd_pixels.dds"] = stream.getvalue()[:80] + bytes(4) + stream.getvalue()[84:]
    stream = BytesIO()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(stream, "PNG")
    files["sixteen_bits.png"] = stream.getvalue()
    return files


@pytest.mark.parametrize(("name", "content"), damaged_files().items(), ids=list(damaged_files()))
def test_a_damaged_image_file_is_reported_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_image(str(path), "RGB")
    assert f"image {path}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_file_that_went_away_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read image .*gone\.png: .*No such file"):
        read_image(str(tmp_path / "gone.png"), "RGB")


# --- train_limit


def test_a_limit_keeps_that_many_training_images_evenly_over_the_classes() -> None:
    train, validation = load("digits", train_limit=205)
    assert len(train) == 205 and len(validation) == 500
    per_class = np.bincount(train.labels)
    assert set(per_class.tolist()) == {20, 21}


def test_a_limited_set_is_part_of_a_larger_one_and_of_the_training_images() -> None:
    def names(limit: int | None) -> set[str]:
        train, _ = load("digits", train_limit=limit)
        return {train.describe(index) for index in range(len(train))}

    assert names(30) < names(100) < names(None)


def test_a_limited_set_still_pairs_images_with_their_labels(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    train, _ = load("fashion_mnist", tmp_path, channels=1, train_limit=12)
    images, labels = fashion_arrays(NUM_TRAIN)
    for index in range(12):
        [position] = np.flatnonzero((images == np.asarray(train.image(index))).all(axis=(1, 2)))
        assert train.label(index) == labels[position]


def test_a_limit_above_the_size_of_the_set_keeps_everything() -> None:
    assert len(load("digits", train_limit=100_000)[0]) == 1297


def test_classes_take_turns_until_the_small_ones_run_out() -> None:
    labels = np.array([0, 0, 0, 0, 2, 2, 5])
    order = spread_over_classes(labels)
    assert sorted(order.tolist()) == list(range(7))
    assert sorted(labels[order[:3]].tolist()) == [0, 2, 5]
    assert sorted(labels[order[3:5]].tolist()) == [0, 2]
    assert labels[order[5:]].tolist() == [0, 0]
