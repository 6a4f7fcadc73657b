"""Artificial damage to images at severities 1 to 5, to measure a network out of distribution.

The kinds are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) that mean something
for any size and number of channels, done with torchvision's own operations. Strengths of blurring,
pixelation and warping are fractions of the image's size, so that 28 x 28 grey images and 224 x 224
photographs suffer alike. Figures are comparable with each other, not with the published ImageNet-C
files. Letters: C channels, H height, W width.
"""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as ops

from m2mkd.train.evaluate import Batches, evaluate_logits
from m2mkd.train.progress import Reporter

SEVERITIES = (1, 2, 3, 4, 5)
_WARP_GRID = 6  # random points across the image


def corrupt(pixels_CHW: Tensor, kind: str, severity: int) -> Tensor:
    """Damages one image; draws from torch's global CPU generator.

    Args:
        pixels_CHW: [C, H, W], uint8, C 1 or 3.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5.

    Returns:
        [C, H, W], uint8.
    """
    damage, strengths = _KINDS[kind]
    return damage(pixels_CHW, strengths[severity - 1])


def measure_corruptions(
    predict: Callable[[Tensor], Tensor],
    batches: Callable[[tuple[str, int] | None], Batches],
    reporter: Reporter,
) -> dict[str, Any]:
    """Grades anything that maps images to logits under every corruption at every severity.

    Args:
        predict: Maps images [B, C, H, W] to logits.
        batches: Gives images and labels under a kind and severity of damage, or clean ones:
            `m2mkd.train.data.ImageData.validation_batches`.
        reporter: Where progress goes.

    Returns:
        `clean` (top-1 without damage, per cent), `count` (images), `top1` (by kind, a list over the
        severities), `mean` (over all of them).
    """
    clean = evaluate_logits(predict, batches(None))
    top1: dict[str, list[float]] = {kind: [] for kind in CORRUPTIONS}
    reporter.start("corruptions", len(CORRUPTIONS) * len(SEVERITIES))
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            result = evaluate_logits(predict, batches((kind, severity)))
            top1[kind].append(round(result.top1, 3))
            reporter.advance(f"{kind} {severity}: {result.top1:.1f} %")
    reporter.finish()
    mean = sum(map(sum, top1.values())) / (len(CORRUPTIONS) * len(SEVERITIES))
    clean_top1 = round(clean.top1, 3)
    return {"clean": clean_top1, "count": clean.count, "top1": top1, "mean": round(mean, 3)}


def _noisy(pixels_CHW: Tensor, strength: float) -> Tensor:
    noise_CHW = strength * torch.randn(pixels_CHW.shape)
    return _bytes(_unit(pixels_CHW) + noise_CHW)


def _shot(pixels_CHW: Tensor, photons: float) -> Tensor:
    return _bytes(torch.poisson(_unit(pixels_CHW) * photons) / photons)


def _impulse(pixels_CHW: Tensor, share: float) -> Tensor:
    """Salt and pepper, alike in all channels."""
    chance_1HW = torch.rand(1, *pixels_CHW.shape[1:])
    salted_CHW = torch.where(chance_1HW < share / 2, 255, pixels_CHW)
    return torch.where(chance_1HW > 1 - share / 2, 0, salted_CHW).to(torch.uint8)


def _blurred(pixels_CHW: Tensor, fraction: float) -> Tensor:
    sigma = fraction * min(pixels_CHW.shape[1:])
    # Reflection at the border allows for no more than the image itself.
    width = 2 * min(max(1, round(3 * sigma)), min(pixels_CHW.shape[1:]) - 1) + 1
    # One direction after the other takes a tenth of the time of both at once.
    across = ops.gaussian_blur(_unit(pixels_CHW), [width, 1], [sigma, sigma])
    return _bytes(ops.gaussian_blur(across, [1, width], [sigma, sigma]))


def _pixelated(pixels_CHW: Tensor, fraction: float) -> Tensor:
    height, width = pixels_CHW.shape[1:]
    size = [max(1, round(fraction * height)), max(1, round(fraction * width))]
    small = ops.resize(pixels_CHW, size, InterpolationMode.BILINEAR, antialias=True)
    large: Tensor = ops.resize(small, [height, width], InterpolationMode.NEAREST)
    return large


def _warped(pixels_CHW: Tensor, fraction: float) -> Tensor:
    """A smooth random displacement with a deviation of `fraction` of the image's size."""
    coarse = torch.randn(1, 2, _WARP_GRID, _WARP_GRID)
    size = list(pixels_CHW.shape[1:])
    smooth_2HW = F.interpolate(coarse, size, mode="bicubic", align_corners=True)[0]
    # torchvision measures displacements in halves of the image.
    displacement_1HW2 = (2 * fraction * smooth_2HW).permute(1, 2, 0)[None]
    warped: Tensor = ops.elastic(pixels_CHW, displacement_1HW2)
    return warped


def _compressed(pixels_CHW: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()  # torchvision's own codec is on its way out
    ops.to_pil_image(pixels_CHW).save(buffer, "JPEG", quality=quality)
    compressed: Tensor = ops.pil_to_tensor(Image.open(buffer))
    return compressed


def _unit(pixels_CHW: Tensor) -> Tensor:
    return pixels_CHW.to(torch.float32) / 255


def _bytes(values_CHW: Tensor) -> Tensor:
    return values_CHW.clamp(0, 1).mul(255).round().to(torch.uint8)


_Strengths = tuple[Any, Any, Any, Any, Any]
_KINDS: dict[str, tuple[Callable[[Tensor, Any], Tensor], _Strengths]] = {
    "gaussian_noise": (_noisy, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_blurred, (0.0125, 0.019, 0.025, 0.031, 0.044)),
    "brightness": (ops.adjust_brightness, (1.2, 1.4, 1.7, 2.1, 2.6)),
    "contrast": (ops.adjust_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic": (_warped, (0.01, 0.015, 0.02, 0.03, 0.04)),
    "pixelate": (_pixelated, (0.8, 0.65, 0.5, 0.4, 0.3)),
    "jpeg": (_compressed, (25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(_KINDS)
