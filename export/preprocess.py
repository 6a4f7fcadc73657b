"""From image files to normalised arrays with Pillow and NumPy, equal to timm's eval transform.

Letters: C channels, H height, W width.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from m2mkd.errors import DataError
from m2mkd.export.errors import UnsupportedModelError

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {1: "L", 3: "RGB"}


def check_preprocessing(config: dict[str, Any]) -> None:
    """Checks that `prepare` can do what a timm data config asks.

    Raises:
        UnsupportedModelError: Another crop or interpolation than it knows.
    """
    channels, height, width = config["input_size"]
    if config["crop_mode"] != "center" or config["interpolation"] not in _RESAMPLING:
        raise UnsupportedModelError(
            f"preprocessing with crop_mode={config['crop_mode']!r} and "
            f"interpolation={config['interpolation']!r} cannot be exported; crop_mode must be "
            f"center, and interpolation one of {', '.join(_RESAMPLING)}"
        )
    if channels not in _MODES or height != width:
        raise UnsupportedModelError(
            f"input_size {config['input_size']} cannot be exported; it must be square, with 1 or 3 "
            "channels"
        )


def read_image(path: Path, channels: int) -> Image.Image:
    """Decodes an image file completely, as greyscale or RGB.

    Raises:
        DataError: The file is missing, damaged, not an image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to 255 and hand back an almost white image.
                reason = f"it has more than 8 bits per channel (mode {image.mode})"
            else:
                return image.convert(_MODES[channels])
    except FileNotFoundError:
        reason = "there is no such file"
    except UnidentifiedImageError:
        reason = "it is empty or in no known image format"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
    raise DataError(f"cannot read image {path}: {reason}")


def prepare(image: Image.Image, config: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Resizes, crops and normalises one image.

    The shorter side becomes floor(size / crop_pct), the centre is cut out, pixels are scaled to
    [0, 1] and normalised, as `timm.data.create_transform` does for evaluation.

    Args:
        image: Mode L or RGB, as the config's channels ask.
        config: timm data config; see `check_preprocessing`.

    Returns:
        [C, H, W], float32.
    """
    size = config["input_size"][-1]
    resampling = _RESAMPLING[config["interpolation"]]
    image = _resize_short_side(image, math.floor(size / config["crop_pct"]), resampling)
    # Python's round, to even, is what torchvision's centre crop uses.
    left = round((image.width - size) / 2.0)
    top = round((image.height - size) / 2.0)
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32).reshape(size, size, -1).transpose(2, 0, 1)
    mean = np.asarray(config["mean"], np.float32)[:, None, None]
    std = np.asarray(config["std"], np.float32)[:, None, None]
    return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def _resize_short_side(image: Image.Image, short: int, resampling: Image.Resampling) -> Image.Image:
    if image.width <= image.height:
        new = (short, int(short * image.height / image.width))
    else:
        new = (int(short * image.width / image.height), short)
    return image if new == image.size else image.resize(new, resampling)
