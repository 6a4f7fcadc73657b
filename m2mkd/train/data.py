"""The images of a run, in batches whose content depends on the seed and nothing else.

The order of an epoch is a function of (seed, epoch), and what augmentation does to an image of
(seed, epoch, index), so a resumed run meets the batches of an uninterrupted one bit for bit,
with any number of workers. Letters: B batch, C channels, H height, W width.
"""

import math
import random
import time
from collections.abc import Iterable, Iterator
from copy import copy
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2mkd.errors import CheckpointError, ConfigError, DataError
from m2mkd.recipe import DataConfig, named_for
from m2mkd.train.augment import Preparation, global_generators_kept, preprocessing
from m2mkd.train.datasets import load_datasets, spread_over_classes
from m2mkd.train.image_set import ImageDataset
from m2mkd.train.stopping import outlive_signals
from m2mkd.train.world import World

__all__ = ["ImageData", "ImageDataset", "load_datasets"]


# How long the signal that a worker died may take after the connection to it broke.
_SIGNAL_SECONDS = 5.0


class _Batch(NamedTuple):
    images_BCHW: Tensor
    labels_B: Tensor
    # Index and message of every image that could not be read. Workers report them as data: an
    # exception would reach the main process wrapped in a traceback.
    unreadable: list[tuple[int, str]]


def _with_deaths_told(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches; a worker that dies while it hands one over ends them as any other death does.

    The receiver then sees a broken connection first. That the worker is dead comes by a signal,
    whose handler in torch raises an error that says what it died of.
    """
    batch = iter(batches)
    while True:
        try:
            found = next(batch)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            time.sleep(_SIGNAL_SECONDS)
            raise RuntimeError("DataLoader worker was lost while it sent a batch") from error
        yield found


class _BatchReader(Dataset[_Batch]):
    """Reads, augments and normalises whole batches; runs in the workers.

    Positions at and past the number of images N are further copies: p is copy p // N of p % N.
    """

    def __init__(self, images: ImageDataset, preparation: Preparation, key: str) -> None:
        self._images = images
        self._preparation = preparation
        self._key = key

    def __getitem__(self, indices: list[int]) -> _Batch:
        pixels: list[Tensor] = []
        keys: list[str] = []
        labels: list[int] = []
        unreadable: list[tuple[int, str]] = []
        with global_generators_kept():
            for position in indices:
                number, index = divmod(position, len(self._images))
                try:
                    image = self._images.image(index)
                except DataError as error:
                    unreadable.append((index, str(error)))
                    continue
                suffix = f"/{number}" if number else ""
                keys.append(f"{self._key}/{index}{suffix}")
                labels.append(self._images.label(index))
                pixels.append(self._preparation.transform(image, keys[-1]))
            images_BCHW = self._preparation.finish(pixels, keys) if pixels else torch.empty(0)
        return _Batch(images_BCHW, torch.tensor(labels, dtype=torch.int64), unreadable)


class ImageData:
    """The training and validation images of a run.

    Attributes:
        train: Training images, before any preparation.
        validation: Held-out images, before any preparation.
        class_names: Name of every class.
        num_classes: Number of classes.
        batch_size: Images of one batch.
        accumulate: Batches of this process in an optimiser step.
        images_per_step: Images of one optimiser step, over all processes.
        steps_per_epoch: Optimiser steps per epoch, the same in every process. They are all full
            (the rest of the shuffled order is left out); one process that takes one batch a step
            makes a smaller batch of a set smaller than that.
        key: The recipe's section that this is.
        preprocessing: What inference must do to an image, JSON-able, in timm's terms.
    """

    def __init__(
        self, config: DataConfig, seed: int, world: World | None = None, *, key: str = "data"
    ) -> None:
        """Opens the data; nothing is decoded yet.

        Args:
            config: What to open.
            seed: Determines order and augmentation.
            world: Which process this is; each reads its own part of every step.
            key: The recipe's section that this is, for messages.

        Raises:
            DataError: The data are missing, empty or inconsistent.
            ConfigError: The augmentation cannot work, or there are fewer images than a step takes.
        """
        try:
            self.train, self.validation = load_datasets(config)
            self._augmented = Preparation(config, is_training=True)
        except (ConfigError, DataError) as error:
            raise type(error)(named_for(key, str(error))) from None
        self.class_names = self.train.class_names
        self.num_classes = self.train.num_classes
        self._world = world or World()
        self.batch_size, self.accumulate = config.batch_size, config.accumulate
        self.images_per_step = config.batch_size * config.accumulate * self._world.size
        if len(self.train) < self.images_per_step > config.batch_size:
            raise ConfigError(
                f"a step takes {self.images_per_step} images ({key}.batch_size "
                f"{config.batch_size} x {key}.accumulate {config.accumulate} x {self._world.size} "
                f"processes), but there are {len(self.train)} training images; lower "
                f"{key}.batch_size"
            )
        self.steps_per_epoch = max(1, len(self.train) // self.images_per_step)
        self.preprocessing = preprocessing(config)
        self.key = key
        self._config = config
        self._seed = seed
        self._plain = Preparation(config, is_training=False)
        self._unreadable: set[tuple[str, int]] = set()

    @property
    def bad_images(self) -> int:
        """Number of different images left out so far because they cannot be read."""
        return len(self._unreadable)

    def in_steps_of(self, images: int) -> "ImageData":
        """The same data in steps of as many images, whatever the number of processes.

        A stage that other processes began goes on in their steps. Batches become no larger than
        `batch_size` of the recipe; those of mixed images stay even.

        Args:
            images: Images of one optimiser step, over all processes.

        Raises:
            CheckpointError: The processes cannot share them evenly.
        """
        own, rest = divmod(images, self._world.size)
        divisor = 2 if self._config.augment.mixes_images else 1
        sizes = [n for n in range(1, self._config.batch_size + 1) if not (own % n or n % divisor)]
        if rest or not sizes:
            raise CheckpointError(
                f"the stage was begun in steps of {images} images, which {self._world.size} "
                "processes cannot share evenly; start as many processes as before, or a divisor "
                "of that (torchrun --nproc-per-node)"
            )
        data = copy(self)
        data.batch_size, data.accumulate = sizes[-1], own // sizes[-1]
        data.images_per_step = images
        data.steps_per_epoch = max(1, len(self.train) // images)
        return data

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's shuffled, augmented batches of one epoch, `accumulate` per step.

        Args:
            epoch: Counts from 0.
            first_step: Optimiser steps to leave out at the start; their images are not read.

        Yields:
            Images [B, C, H, W], float32, normalised; labels [B], int64.

        Raises:
            DataError: An image cannot be read and `on_bad_image` is fail, or no image of a batch
                can be read.
        """
        key = f"{self._seed}/{epoch}"
        generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
        order_N = torch.randperm(len(self.train), generator=generator)
        repeats = self._config.augment.repeats
        if repeats > 1:
            # As timm's RepeatAugSampler: copies side by side, and an epoch of the usual length.
            # Position p is copy p // N of image p % N.
            copies_NR = order_N[:, None] + len(self.train) * torch.arange(repeats)
            order_N = copies_NR.flatten()[: len(self.train)]
        order = order_N.tolist()
        size = self.batch_size
        own = size * self.accumulate
        starts = [
            step * self.images_per_step + self._world.rank * own + part * size
            for step in range(first_step, self.steps_per_epoch)
            for part in range(self.accumulate)
        ]
        batches = [order[start : start + size] for start in starts]
        return self._read("train", _BatchReader(self.train, self._augmented, key), batches)

    def validation_batches(
        self, corruption: tuple[str, int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every held-out image once, in order, without augmentation.

        Args:
            corruption: Kind and severity of damage done to every image, the same each time.

        Yields:
            Images [B, C, H, W], float32, normalised; labels [B], int64; the last batch may be
            smaller than `eval_batch_size`.

        Raises:
            DataError: An image cannot be read and `on_bad_image` is fail.
        """
        plain, key = self._plain, "validation"
        if corruption is not None:
            plain = Preparation(self._config, is_training=False, corruption=corruption)
            key = "/".join(map(str, corruption))
        reader = _BatchReader(self.validation, plain, key)
        return self._read("validation", reader, self._in_order(range(len(self.validation))))

    def own_validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's share of the held-out images, equally many batches everywhere.

        Yields:
            As `validation_batches`; batches that hold no image (none left, or none readable) are
            empty.
        """
        batches = self._in_order(range(len(self.validation)))
        own = batches[self._world.rank :: self._world.size]
        reader = _BatchReader(self.validation, self._plain, "validation")
        yield from self._read("validation", reader, own, keep_empty=True)
        for _ in range(math.ceil(len(batches) / self._world.size) - len(own)):
            yield torch.empty(0), torch.empty(0, dtype=torch.int64)

    def plain_batches(
        self, images: ImageDataset, indices: Iterable[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields some images of `train` or `validation`, in the given order, as for evaluation.

        Yields:
            As `validation_batches`.

        Raises:
            DataError: An image cannot be read and `on_bad_image` is fail.
        """
        split = "train" if images is self.train else "validation"
        return self._read(split, _BatchReader(images, self._plain, split), self._in_order(indices))

    def _in_order(self, indices: Iterable[int]) -> list[list[int]]:
        order, size = [int(index) for index in indices], self._config.eval_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def sample_images(self, count: int) -> list[tuple[int, str, Image.Image]]:
        """Returns held-out images spread over the classes, always the same ones.

        Args:
            count: How many; fewer are returned when the set has fewer.

        Returns:
            Index in `validation`, class name and unprepared image, ordered by class.

        Raises:
            DataError: An image cannot be read and `on_bad_image` is fail.
        """
        samples: list[tuple[int, str, Image.Image]] = []
        for index in spread_over_classes(self.validation.labels).tolist():
            if len(samples) == count:
                break
            try:
                image = self.validation.image(index)
            except DataError as error:
                self._leave_out("validation", [(index, str(error))])
                continue
            samples.append((index, self.class_names[self.validation.label(index)], image))
        return sorted(samples, key=lambda sample: (self.validation.label(sample[0]), sample[0]))

    def _read(
        self,
        split: str,
        reader: _BatchReader,
        batches: list[list[int]],
        *,
        keep_empty: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            reader,
            sampler=batches,
            batch_size=None,  # the sampler's items are whole batches
            num_workers=min(self._config.workers, len(batches)),
            worker_init_fn=outlive_signals,
            # Without one of its own the loader draws from torch's global generator.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
        for images_BCHW, labels_B, unreadable in _with_deaths_told(loader):
            self._leave_out(split, unreadable)
            if not len(labels_B) and not keep_empty and split == "validation":
                continue
            if not len(labels_B) and not keep_empty:
                raise DataError(
                    f"none of the {len(unreadable)} images of a {split} batch can be read; "
                    f"the first: {unreadable[0][1]}"
                )
            yield images_BCHW, labels_B

    def _leave_out(self, split: str, unreadable: list[tuple[int, str]]) -> None:
        if unreadable and self._config.on_bad_image == "fail":
            raise DataError(
                f"{unreadable[0][1]}; repair or remove it, or leave such images out with "
                f"{self.key}.on_bad_image: skip"
            )
        self._unreadable.update((split, index) for index, _ in unreadable)
