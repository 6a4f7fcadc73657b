"""Networks small enough to be exported in seconds, and run folders that hold them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from m2mkd.models.checkpoint import ModelCard, write_checkpoint

SIZE = 8
NAMES = [str(digit) for digit in range(10)]
PREPROCESSING = {
    "input_size": [1, SIZE, SIZE],
    "interpolation": "bicubic",
    "mean": [0.5],
    "std": [0.25],
    "crop_pct": 1.0,
    "crop_mode": "center",
}
SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
EXPERTS = {"num_experts": 3, "moe_blocks": [1], "act_layer": "gelu_tanh"}


def make_card(model: str = "vmoe_tiny_patch16_224", **model_args: Any) -> ModelCard:
    """A card for a two-block network; V-MoE by default, with experts in the second block."""
    experts = EXPERTS if model.startswith("vmoe") else {}
    args = {**SMALL, **experts, **model_args}
    return ModelCard(model, args, [1, 1], len(NAMES), SIZE, 1, NAMES, dict(PREPROCESSING), "abc")


def make_network(card: ModelCard) -> VisionTransformer:
    """The card's network with weights large enough for every part to matter."""
    torch.manual_seed(0)
    network = card.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def write_run(folder: Path, card: ModelCard, *, num_samples: int = 0) -> Path:
    """Writes a finished run on the digits data set."""
    stage = folder / "end_to_end"
    write_checkpoint(stage, 1, make_network(card).state_dict(), meta={"card": asdict(card)})
    (stage / "DONE").write_text("{}")
    schedule = {"epochs": 1, "lr": 0.001}
    recipe = {
        "name": "small",
        "data": {
            "dataset": "digits",
            "image_size": SIZE,
            "channels": 1,
            "mean": [0.5],
            "std": [0.25],
        },
        "meta": schedule,
        "teacher": {"model": "vit_tiny_patch16_224", "finetune": schedule},
        "student": {"model": card.model},
        "distill": {"schedule": schedule},
        "end_to_end": schedule,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_images(folder / "samples", num_samples)
    return folder


def write_images(folder: Path, count: int) -> list[Path]:
    """Writes greyscale PNG files of random pixels, 8 x 8."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(path)
    return paths
