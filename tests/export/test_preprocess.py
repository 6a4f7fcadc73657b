"""Preparing images with Pillow and NumPy, against timm's transform for evaluation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from m2mkd.errors import DataError
from m2mkd.export.preprocess import prepare, read_image

MEANS = {1: [0.5], 3: [0.485, 0.456, 0.406]}
STDS = {1: [0.25], 3: [0.229, 0.224, 0.225]}


def make_config(channels: int, size: int, interpolation: str, crop_pct: float) -> dict[str, Any]:
    return {
        "input_size": [channels, size, size],
        "interpolation": interpolation,
        "mean": MEANS[channels],
        "std": STDS[channels],
        "crop_pct": crop_pct,
        "crop_mode": "center",
    }


def make_image(width: int, height: int, channels: int) -> Image.Image:
    shape = (height, width) if channels == 1 else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(28, 28, 28), (8, 8, 28), (57, 33, 28), (33, 57, 28), (31, 30, 29), (301, 7, 16), (1, 1, 16)],
)
def test_prepared_images_are_those_of_timm(
    width: int, height: int, size: int, crop_pct: float, interpolation: str, channels: int
) -> None:
    config = make_config(channels, size, interpolation, crop_pct)
    image = make_image(width, height, channels)
    transform = create_transform(
        size,
        is_training=False,
        interpolation=interpolation,
        mean=config["mean"],
        std=config["std"],
        crop_pct=crop_pct,
        crop_mode="center",
    )
    expected = transform(image)
    assert isinstance(expected, torch.Tensor)
    found = prepare(image, config)
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_any_8_bit_image_becomes_grey_or_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    make_image(9, 7, 3).convert(mode).save(path)
    assert read_image(path, 1).mode == "L"
    assert read_image(path, 3).mode == "RGB"
    assert read_image(path, 3).size == (9, 7)


def broken_files(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    make_image(64, 64, 3).save(whole)
    files = {name: folder / f"{name}.png" for name in ("missing", "empty", "text", "cut", "deep")}
    files["empty"].touch()
    files["text"].write_text("not an image")
    files["cut"].write_bytes(whole.read_bytes()[:2000])
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(files["deep"])
    return files


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "empty or in no known image format"),
        ("text", "empty or in no known image format"),
        ("cut", "truncated"),
        ("deep", "more than 8 bits"),
    ],
)
def test_a_file_that_is_no_readable_image_is_named(name: str, reason: str, tmp_path: Path) -> None:
    path = broken_files(tmp_path)[name]
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path, 3)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_serving_modules_do_not_import_torch() -> None:
    code = (
        "import sys, m2mkd.export.predict, m2mkd.export.session; "
        "print([m for m in ('torch', 'timm', 'onnx', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
