"""The folder of a run whose student is a small NAC, without the hours of training."""

import json
from dataclasses import asdict
from pathlib import Path

import timm
import torch
import yaml
from tiny import tiny_recipe

from m2mkd.models.checkpoint import ModelCard, write_checkpoint, write_text
from m2mkd.models.nac import NAC
from m2mkd.train.data import ImageData

MODEL_ARGS = {"inputs_to_read_out": False, "layer_scale": 1.0, "depth": 2}


def write_nac_run(folder: Path) -> NAC:
    """Writes a finished run of `nac_digits` with random weights, and returns it."""
    torch.manual_seed(0)
    model: NAC = timm.create_model("nac_digits", **MODEL_ARGS).eval()
    recipe = tiny_recipe()
    data = ImageData(recipe.data, recipe.seed)
    card = ModelCard(
        model="nac_digits",
        model_args=MODEL_ARGS,
        depths=[2],
        num_classes=10,
        image_size=8,
        channels=1,
        class_names=data.class_names,
        preprocessing=data.preprocessing,
    )
    stage = folder / "end_to_end"
    meta = {"card": asdict(card), "stage": "end_to_end", "digest": "none"}
    write_checkpoint(stage, 0, model.state_dict(), meta=meta)
    write_text(stage / "DONE", json.dumps({"digest": "none", "steps": 0}))
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json")))
    (folder / "samples").mkdir()
    (folder / "samples" / "00000_0.png").write_bytes(b"an image")
    return model
