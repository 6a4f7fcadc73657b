"""Batches: the same from any worker and after any resume, and honest about bad images."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from m2mkd.errors import ConfigError, DataError
from m2mkd.recipe import DataConfig
from m2mkd.train.augment import Preparation, global_generators_kept
from m2mkd.train.data import ImageData

# Python 3.12 and later warn when a process with threads forks its data workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

EVERYTHING = {
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (0.8, 1.25),
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.5,
}
JITTER = {"hflip": 0.5, "color_jitter": 0.4, "random_erase": 0.5}

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 10 training and 5 validation images, 14 x 12 pixels."""
    root = tmp_path_factory.mktemp("images")
    write_noise(root)
    return root


def write_noise(root: Path) -> None:
    noise = np.random.RandomState(0)
    for split, count in (("train", 10), ("val", 5)):
        for name in ("ant", "bee", "cow"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.randint(0, 256, (12, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def folder_data(root: Path, seed: int = 0, **options) -> ImageData:
    settings = {"image_size": 12, "batch_size": 4, "eval_batch_size": 4, **options}
    return ImageData(DataConfig(dataset="image_folder", root=root, **settings), seed)


def digits_data(seed: int = 0, **options) -> ImageData:
    settings = {"image_size": 8, "channels": 1, "train_limit": 40, "batch_size": 8, **options}
    return ImageData(DataConfig(dataset="digits", **settings), seed)


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a_images, b_images) and torch.equal(a_labels, b_labels)
        for (a_images, a_labels), (b_images, b_labels) in zip(first, second, strict=True)
    )


def images_of(batches: Batches) -> Tensor:
    return torch.cat([images for images, _ in batches])


def state_of_generators() -> tuple:
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        numpy_state[1].tolist(),
        numpy_state[2:],
        torch.get_rng_state().tolist(),
    )


# --- the shape of an epoch


def test_batches_are_normalised_floats_with_int64_labels(folder: Path) -> None:
    images, labels = next(folder_data(folder, augment=EVERYTHING).train_batches(0))
    assert images.shape == (4, 3, 12, 12) and images.dtype == torch.float32
    assert labels.shape == (4,) and labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch_size", "steps", "last"), [(8, 5, 8), (7, 5, 7), (40, 1, 40), (41, 1, 40), (27, 1, 27)]
)
def test_an_epoch_has_full_batches_unless_the_set_is_smaller_than_one(
    batch_size: int, steps: int, last: int
) -> None:
    data = digits_data(batch_size=batch_size)
    batches = list(data.train_batches(0))
    assert len(batches) == data.steps_per_epoch == steps
    assert [len(labels) for _, labels in batches] == [batch_size] * (steps - 1) + [last]


def test_an_epoch_shows_every_training_image_once(folder: Path) -> None:
    data = folder_data(folder, batch_size=5)
    shown = images_of(list(data.train_batches(0)))
    assert len(shown) == len(shown.flatten(1).unique(dim=0)) == len(data.train) == 30


def test_labels_stay_with_their_images_when_shuffled(folder: Path) -> None:
    data = folder_data(folder, channels=1, image_size=12)
    plain = Preparation(DataConfig(dataset="digits", image_size=12, channels=1), is_training=False)
    label_of = {
        plain.finish([plain.transform(data.train.image(i), "")], [""]).numpy().tobytes(): (
            data.train.label(i)
        )
        for i in range(30)
    }
    for images, labels in data.train_batches(0):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_validation_shows_every_image_in_order(folder: Path) -> None:
    data = folder_data(folder)
    batches = list(data.validation_batches())
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.class_names == ["ant", "bee", "cow"] and data.num_classes == 3


# --- determinism


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[float]:
        return images_of(list(digits_data(seed).train_batches(epoch))).sum((1, 2, 3)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) != order(0, 0)
    assert order(1, 0) != order(0, 0)
    assert sorted(order(0, 1)) == sorted(order(0, 0)) == sorted(order(1, 0))


@pytest.mark.parametrize("augment", [{}, EVERYTHING, JITTER], ids=["plain", "everything", "jitter"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_continues_bit_for_bit(folder: Path, augment: dict, workers: int) -> None:
    whole = list(folder_data(folder, augment=augment).train_batches(3))
    for first_step in (0, 4, 7):
        data = folder_data(folder, augment=augment, workers=workers)
        assert same(list(data.train_batches(3, first_step=first_step)), whole[first_step:])


def test_an_epoch_resumed_at_its_end_is_empty() -> None:
    data = digits_data()
    assert list(data.train_batches(0, first_step=data.steps_per_epoch)) == []


def test_validation_is_the_same_with_workers(folder: Path) -> None:
    assert same(
        list(folder_data(folder).validation_batches()),
        list(folder_data(folder, workers=2).validation_batches()),
    )


def test_the_augmentation_of_an_image_does_not_depend_on_its_batch(folder: Path) -> None:
    small = images_of(list(folder_data(folder, batch_size=3, augment=EVERYTHING).train_batches(1)))
    large = images_of(list(folder_data(folder, batch_size=15, augment=EVERYTHING).train_batches(1)))
    assert torch.equal(small, large)


def test_augmentation_differs_between_epochs_seeds_and_images() -> None:
    config = DataConfig(dataset="digits", image_size=8, channels=1, augment=EVERYTHING)
    preparation = Preparation(config, is_training=True)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    with global_generators_kept():
        versions = [preparation.transform(image, f"0/0/{index}") for index in range(8)]
    assert len(torch.stack(versions).flatten(1).unique(dim=0)) > 5

    def batch(seed: int, epoch: int) -> Tensor:
        # One image only, so that the order plays no part.
        data = digits_data(seed, train_limit=1, augment=EVERYTHING)
        return images_of(list(data.train_batches(epoch)))

    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert not torch.equal(batch(0, 0), batch(1, 0))


def test_equal_images_of_a_batch_are_augmented_differently(tmp_path: Path) -> None:
    write_noise(tmp_path)
    paths = sorted((tmp_path / "train").rglob("*.png"))
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    data = folder_data(tmp_path, augment={"crop_scale": (0.3, 1.0)}, batch_size=30)
    assert len(images_of(list(data.train_batches(0))).flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_left_alone(folder: Path, workers: int) -> None:
    data = folder_data(folder, augment=EVERYTHING, workers=workers)
    before = state_of_generators()
    for _ in data.train_batches(0):
        assert state_of_generators() == before
    list(data.validation_batches())
    data.sample_images(3)
    assert state_of_generators() == before


def test_the_callers_random_state_does_not_change_the_batches(folder: Path) -> None:
    data = folder_data(folder, augment=EVERYTHING)
    first = list(data.train_batches(0))
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    torch.randn(1), np.random.randn(), random.gauss(0, 1)
    assert same(list(data.train_batches(0)), first)


def test_the_callers_random_state_survives_an_exception() -> None:
    before = state_of_generators()
    with pytest.raises(KeyError), global_generators_kept():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        raise KeyError
    assert state_of_generators() == before


# --- transforms


@pytest.mark.parametrize("channels", [1, 3])
def test_preparation_gives_the_values_of_timms_normalising_transform(
    folder: Path, channels: int
) -> None:
    data = folder_data(
        folder,
        channels=channels,
        image_size=10,
        mean=(0.48, 0.45, 0.4)[:channels],
        std=(0.22, 0.23, 0.25)[:channels],
        crop_pct=0.9,
    )
    preprocessing = json.loads(json.dumps(data.preprocessing))
    reference = create_transform(**preprocessing)
    expected = torch.stack([reference(data.validation.image(index)) for index in range(15)])
    assert torch.equal(images_of(list(data.validation_batches())), expected)


def test_preprocessing_says_all_that_inference_needs(folder: Path) -> None:
    assert folder_data(folder, interpolation="bilinear", crop_pct=0.875).preprocessing == {
        "input_size": [3, 12, 12],
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def raw_digits(data: ImageData) -> set[bytes]:
    return {np.asarray(data.train.image(i)).tobytes() for i in range(len(data.train))}


def to_bytes(image_CHW: Tensor) -> bytes:
    return (image_CHW[0] * 127.5 + 127.5).round().to(torch.uint8).numpy().tobytes()


def test_images_of_the_right_size_are_not_resampled_without_augmentation() -> None:
    data = digits_data()
    assert {to_bytes(image) for image in images_of(list(data.train_batches(0)))} == raw_digits(data)


def test_images_of_the_right_size_are_only_mirrored_when_flipping_is_all() -> None:
    data = digits_data(augment={"hflip": 1.0})
    mirrored = {to_bytes(image.flip(-1)) for image in images_of(list(data.train_batches(0)))}
    assert mirrored == raw_digits(data)


def test_a_wide_image_keeps_its_aspect_in_training_and_validation(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255  # the middle third is all that a square crop may see
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "wide.png")
    data = folder_data(tmp_path, image_size=10)
    assert (images_of(list(data.train_batches(0))) == 1).all()
    assert (images_of(list(data.validation_batches())) == 1).all()


def test_validation_is_never_augmented(folder: Path) -> None:
    augmented = folder_data(folder, augment=EVERYTHING)
    assert same(
        list(augmented.validation_batches()), list(folder_data(folder).validation_batches())
    )


def test_random_erasing_works_without_other_augmentation() -> None:
    data = digits_data(augment={"random_erase": 1.0})
    erased = images_of(list(data.train_batches(0)))
    originals = images_of(list(digits_data().train_batches(0)))
    changed = (erased != originals).flatten(1).float().mean(1)
    assert (changed > 0).all() and (changed < 0.6).all()


@pytest.mark.parametrize(
    "policy",
    ["rand-m10-n3-inc1", "rand-m9-mstd101", "v0", "v0r", "original-mstd0.5", "augmix-m9", "3a"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_timm_policy_works(folder: Path, channels: int, policy: str) -> None:
    config = DataConfig(
        dataset="digits", image_size=12, channels=channels, augment={"auto_augment": policy}
    )
    preparation = Preparation(config, is_training=True)
    image = folder_data(folder, channels=channels).train.image(0)
    with global_generators_kept():
        results = [preparation.transform(image, str(key)) for key in range(100)]
    assert {(tuple(result.shape), result.dtype) for result in results} == {
        ((channels, 12, 12), torch.uint8)
    }


def test_full_posterizing_gives_a_black_image() -> None:
    config = DataConfig(dataset="digits", image_size=8, augment={"auto_augment": "rand-m10-inc1"})
    step = Preparation(config, is_training=True)._transform.transforms[1]
    [operation] = [op for op in step.ops if op.name == "PosterizeIncreasing"]
    operation.prob = 1.0
    assert operation(Image.new("RGB", (8, 8), "white")).getextrema() == ((0, 0),) * 3
    operation.magnitude = 5  # keeps 2 bits
    assert operation(Image.new("RGB", (8, 8), "white")).getextrema() == ((192, 192),) * 3


@pytest.mark.parametrize("policy", ["foo", "rand-m9-xyz3", "rand-mstd0.5.5", "augmixx"])
def test_an_unknown_policy_is_a_configuration_error(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"auto_augment='{policy}' is not a policy timm knows"):
        digits_data(augment={"auto_augment": policy})


def test_jitter_that_timm_ignores_beside_a_policy_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="timm ignores color_jitter=0.4"):
        digits_data(augment={"auto_augment": "rand-m9", "color_jitter": 0.4})


# --- sample images


def test_sample_images_spread_over_the_classes_and_are_always_the_same(folder: Path) -> None:
    samples = folder_data(folder).sample_images(7)
    assert sorted(Counter(name for _, name, _ in samples).values()) == [2, 2, 3]
    again = folder_data(folder, seed=5, augment=EVERYTHING).sample_images(7)
    assert [index for index, _, _ in again] == [index for index, _, _ in samples]
    data = folder_data(folder)
    for index, name, image in samples:
        assert data.class_names[data.validation.label(index)] == name
        assert image == data.validation.image(index)


def test_fewer_sample_images_come_from_a_smaller_set(folder: Path) -> None:
    assert len(folder_data(folder).sample_images(100)) == 15


# --- bad images


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The folder with one empty training image and one cut validation image."""
    write_noise(tmp_path)
    (tmp_path / "train" / "bee" / "4.png").write_bytes(b"")
    path = tmp_path / "val" / "cow" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_epoch_with_one_line_that_names_it(
    damaged: Path, workers: int
) -> None:
    data = folder_data(damaged, workers=workers)
    with pytest.raises(DataError) as caught:
        list(data.train_batches(0))
    message = str(caught.value)
    assert str(damaged / "train" / "bee" / "4.png") in message and "\n" not in message
    assert message.endswith("data.on_bad_image: skip")
    with pytest.raises(DataError, match=r"val/cow/2\.png"):
        list(data.validation_batches())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_left_out_of_its_batch_and_counted_once(
    damaged: Path, workers: int
) -> None:
    data = folder_data(damaged, workers=workers, on_bad_image="skip", batch_size=5)
    assert data.bad_images == 0
    for epoch in range(2):
        assert sorted(len(labels) for _, labels in data.train_batches(epoch)) == [4, 5, 5, 5, 5, 5]
        assert data.bad_images == 1
    assert [len(labels) for _, labels in data.validation_batches()] == [4, 4, 4, 2]
    list(data.validation_batches())
    assert data.bad_images == 2


def test_skipping_changes_nothing_for_the_other_images(folder: Path, damaged: Path) -> None:
    skipping = folder_data(damaged, augment=EVERYTHING, on_bad_image="skip", batch_size=30)
    [(kept, _)] = skipping.train_batches(0)
    [(whole, _)] = folder_data(folder, augment=EVERYTHING, batch_size=30).train_batches(0)
    is_kept = (whole[:, None] == kept[None]).flatten(2).all(2).any(1)
    assert len(kept) == 29 and is_kept.sum() == 29


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_batch_without_a_readable_image_is_an_error_even_when_skipping(
    damaged: Path, workers: int
) -> None:
    for path in (damaged / "val" / "ant").iterdir():
        path.write_text("not an image")
    for path in (damaged / "train").glob("*/*"):
        path.write_text("not an image")
    data = folder_data(damaged, workers=workers, on_bad_image="skip")
    with pytest.raises(DataError, match=r"none of the \d+ images of a train batch"):
        list(data.train_batches(0))
    # The first batch of validation images is all ants: the others are still evaluated.
    labels = torch.cat([labels for _, labels in data.validation_batches()])
    assert 0 < len(labels) < len(data.validation) and 0 not in labels


def test_sample_images_pass_over_bad_ones_when_skipping(damaged: Path) -> None:
    data = folder_data(damaged, on_bad_image="skip")
    samples = data.sample_images(100)
    assert len(samples) == 14 and data.bad_images == 1
    with pytest.raises(DataError, match=r"val/cow/2\.png"):
        folder_data(damaged).sample_images(100)


def test_steps_before_the_resumed_one_are_not_read(folder: Path, tmp_path: Path) -> None:
    write_noise(tmp_path)
    whole = list(folder_data(folder).train_batches(0))
    [first] = [list(labels) for _, labels in whole[:1]]
    data = folder_data(tmp_path)
    first_batch = {image.numpy().tobytes() for image in whole[0][0]}
    plain = Preparation(DataConfig(dataset="digits", image_size=12), is_training=False)
    spoilt = 0
    for index in range(30):
        image = plain.finish([plain.transform(data.train.image(index), "")], [""])[0]
        if image.numpy().tobytes() in first_batch:
            Path(data.train.describe(index)).write_bytes(b"")
            spoilt += 1
    assert spoilt == len(first) == 4
    assert same(list(data.train_batches(0, first_step=1)), whole[1:])
    with pytest.raises(DataError):
        list(data.train_batches(0))
