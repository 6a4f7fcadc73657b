"""From PIL images to normalised batches: timm's transforms, with randomness tied to the sample.

timm and torchvision draw from the global generators of `random`, numpy and torch. Here all three
are seeded for every sample, so what happens to an image depends on its key alone and not on the
worker, the batch or the samples before it. Letters: B batch, C channels, H height, W width.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor

from m2mkd.errors import ConfigError
from m2mkd.recipe import Augmentation, DataConfig
from m2mkd.train.corruptions import corrupt


class Preparation:
    """Turns PIL images into rows of a normalised batch.

    The transforms end in bytes and a whole batch is normalised at once: the values are those of
    timm's own normalising transforms, in less than half the time for small images.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        is_training: bool,
        corruption: tuple[str, int] | None = None,
    ) -> None:
        """Builds the transforms of one split.

        Args:
            config: The data section.
            is_training: Whether to augment.
            corruption: Kind and severity of damage after resizing, see `m2mkd.train.corruptions`.

        Raises:
            ConfigError: `auto_augment` is not a policy timm knows.
        """
        augment = config.augment
        self._is_random = is_training and _changes_images(augment)
        self._transform = (
            _augmenting_transform(config)
            if self._is_random
            else _plain_transform(config, is_training=is_training)
        )
        self._erasing = (
            RandomErasing(augment.random_erase, mode="pixel", device="cpu")
            if is_training and augment.random_erase > 0
            else None
        )
        self._corruption = corruption
        mean, std = config.normalisation
        self._mean_C11 = torch.tensor(mean).view(-1, 1, 1)
        self._std_C11 = torch.tensor(std).view(-1, 1, 1)

    def transform(self, image: Image.Image, key: str) -> Tensor:
        """Resizes, crops and augments one image.

        Args:
            image: Mode L or RGB, any size.
            key: Names the sample; equal keys augment equally.

        Returns:
            Pixels, [C, H, W], uint8.
        """
        if self._is_random or self._corruption is not None:
            _seed_global_generators(key)
        pixels_CHW: Tensor = self._transform(image)
        return pixels_CHW if self._corruption is None else corrupt(pixels_CHW, *self._corruption)

    def finish(self, pixels: list[Tensor], keys: list[str]) -> Tensor:
        """Normalises, then erases rectangles where the configuration says so.

        Args:
            pixels: One [C, H, W] uint8 tensor per sample, at least one.
            keys: The key of each sample.

        Returns:
            Images, [B, C, H, W], float32.
        """
        batch_BCHW = torch.stack(pixels).to(torch.float32).div_(255)
        batch_BCHW.sub_(self._mean_C11).div_(self._std_C11)
        if self._erasing is not None:
            for image_CHW, key in zip(batch_BCHW, keys, strict=True):
                _seed_global_generators(f"{key}/erase")
                self._erasing(image_CHW)
        return batch_BCHW


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Gives the global CPU generators of `random`, numpy and torch their state back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """Returns what inference must do to an image, as a JSON-able data configuration of timm's."""
    mean, std = config.normalisation
    return {
        "input_size": [config.channels, config.image_size, config.image_size],
        "interpolation": config.interpolation,
        "mean": list(mean),
        "std": list(std),
        "crop_pct": config.crop_pct,
        "crop_mode": "center",
    }


def _seed_global_generators(key: str) -> None:
    # A text seed is hashed by `random` the same way in every process and Python version.
    random.seed(key)
    np.random.seed(random.getrandbits(32))
    # torch.manual_seed would also reseed the GPUs, and takes a hundred times longer.
    torch.default_generator.manual_seed(random.getrandbits(63))


def _changes_images(augment: Augmentation) -> bool:
    """Whether anything random happens to an image before it is normalised."""
    return bool(
        augment.crop_scale != (1.0, 1.0)
        or augment.crop_ratio != (1.0, 1.0)
        or augment.hflip
        or augment.color_jitter
        or augment.auto_augment
    )


def _plain_transform(config: DataConfig, *, is_training: bool) -> Any:
    # A single number for the size keeps the aspect of the image; a pair would squash it.
    return create_transform(
        config.image_size,
        is_training=is_training,
        no_aug=True,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode="center",
        normalize=False,
    )


def _augmenting_transform(config: DataConfig) -> Any:
    augment = config.augment
    policy = augment.auto_augment
    if policy and augment.color_jitter and "3a" not in policy:
        warnings.warn(
            f"timm ignores color_jitter={augment.color_jitter} beside auto_augment={policy}",
            stacklevel=2,
        )
    jitter: Any = augment.color_jitter or None  # 0 would still cost a transform
    try:
        transform = create_transform(
            config.image_size,
            is_training=True,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.hflip,
            color_jitter=jitter,
            auto_augment=policy,
            interpolation=config.interpolation,
            mean=config.normalisation[0],  # fills what shearing and rotating uncover
            normalize=False,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"data.augment.auto_augment={policy!r} is not a policy timm knows"
            f"{f' ({error})' if str(error) else ''}; one it knows is rand-m9-mstd0.5-inc1"
        ) from None
    _allow_zero_bits(transform)
    return transform


def _allow_zero_bits(transform: Any) -> None:
    """Lets timm's posterize reach its full magnitude, 0 bits.

    ImageOps.posterize made that a black image before Pillow 13 and raises ValueError since, which
    would end a run with any policy whose magnitude may reach 10.
    """
    for step in transform.transforms:
        policies = getattr(step, "policy", [getattr(step, "ops", [])])
        for operation in (operation for policy in policies for operation in policy):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = posterize(image, bits_to_keep, **unused)
    return posterized
