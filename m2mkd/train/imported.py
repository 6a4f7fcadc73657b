"""Runs that were not trained here: a published network in a run folder of ours."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from m2mkd.errors import CheckpointError, ConfigError, DataError
from m2mkd.models.checkpoint import ModelCard, write_checkpoint, write_text
from m2mkd.recipe import DataConfig, digest, make_data
from m2mkd.train.augment import preprocessing
from m2mkd.train.datasets import load_datasets
from m2mkd.train.networks import versions

_HEADER = """\
# Written by `m2mkd import`: a published network, trained elsewhere. Only `data` is used, by
# `m2mkd evaluate` and `m2mkd export`.
"""
# The published evaluation crops the centre of an image 256 / 224 as large.
_CROP = 0.875
# The published names of data sets, as recipes call them.
_DATASETS = {"TINY-IMNET": "tiny_imagenet", "IMNET": "imagenet"}


def published_data(
    config: dict[str, Any],
    *,
    image_size: int,
    channels: int,
    dataset: str | None,
    root: Path | None,
    overrides: tuple[str, ...] = (),
) -> DataConfig:
    """The data section of an imported run: ImageNet's normalisation, as the published code has.

    Args:
        config: The published file; its data.dataset.kwargs.data_path is the root if there is none.
        image_size: Of the network.
        channels: Of the network.
        dataset: One that recipes know; None takes the published one.
        root: Its folder.
        overrides: `data.key=value` strings.

    Raises:
        ConfigError: A key or value that cannot work.
    """
    published = (config.get("data") or {}).get("dataset") or {}
    if dataset is None:
        dataset = _DATASETS.get(published.get("name", ""), "image_folder")
    if root is None and dataset != "digits":
        root = Path((published.get("kwargs") or {}).get("data_path") or "data")
    values: dict[str, Any] = {
        "dataset": dataset,
        "image_size": image_size,
        "channels": channels,
        "crop_pct": _CROP,
    }
    if root is not None:
        values["root"] = root
    if channels == len(IMAGENET_DEFAULT_MEAN):
        values |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    return make_data({"data": values}, source="of the imported run", overrides=overrides)


def class_names_of(data: DataConfig, num_classes: int) -> list[str] | None:
    """Names of the classes in the order of the data set's labels; None where it is not here.

    Raises:
        DataError: The data set has another number of classes than the network.
    """
    try:
        names = load_datasets(data)[0].class_names
    except DataError:
        if data.root is not None and data.root.exists():
            raise
        return None
    if len(names) != num_classes:
        raise DataError(
            f"the data set has {len(names)} classes, the network {num_classes}; give the data set "
            "that it was trained on"
        )
    return names


def write_imported_run(
    out: Path,
    *,
    model: str,
    arguments: dict[str, Any],
    depths: list[int],
    weights: dict[str, Tensor],
    data: DataConfig,
    class_names: list[str] | None,
    facts: dict[str, Any],
) -> Path:
    """Writes a finished run that `m2mkd evaluate` and `m2mkd export` accept.

    Args:
        out: The run folder; it must not hold a run.
        model: timm name.
        arguments: Its arguments, with img_size, in_chans and num_classes among them.
        depths: Blocks per module.
        weights: Of the network.
        data: Data section.
        class_names: In the order of the logits; None numbers them.
        facts: Where the network comes from and what became of every tensor: `import.json`.

    Returns:
        The step folder.

    Raises:
        CheckpointError: The folder holds a run, or cannot be written.
    """
    if (out / "recipe.yaml").exists():
        raise CheckpointError(f"{out} holds a run already; name another folder with -o")
    arguments = json.loads(json.dumps(arguments))  # tuples as lists
    num_classes = arguments.pop("num_classes")
    shape = {
        "num_classes": num_classes,
        "image_size": data.image_size,
        "channels": arguments.pop("in_chans"),
    }
    for name in ("img_size", "drop_path_rate"):  # of the data, and of training
        arguments.pop(name, None)
    card = ModelCard(
        model=model,
        model_args=arguments,
        depths=depths,
        class_names=class_names or [str(i) for i in range(num_classes)],
        preprocessing=preprocessing(data),
        recipe=digest(facts),
        versions=versions(),
        **shape,
    )
    recipe = {
        "name": out.name,
        "data": data.model_dump(mode="json"),
        "student": {"model": model, "model_args": arguments},
    }
    stage = out / "end_to_end"
    step = write_checkpoint(stage, 0, weights, meta={"card": asdict(card), "stage": "end_to_end"})
    write_text(out / "import.json", json.dumps(facts, indent=1, default=str))
    write_text(stage / "DONE", json.dumps({"digest": card.recipe, "steps": 0}, indent=1))
    write_text(out / "recipe.yaml", _HEADER + yaml.safe_dump(recipe, sort_keys=False))
    return step


def square(img_size: Any) -> int:
    """Side of the images of a network, in pixels.

    Raises:
        ConfigError: They are not square.
    """
    height, width = img_size if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if height != width:
        raise ConfigError(f"images of {height}x{width} pixels: runs have square images")
    side: int = height
    return side
