"""Reading published checkpoint files: weights out of the wrappers that training scripts put around.

Files are read with weights-only unpickling: no code in them can run.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from m2mkd.errors import CheckpointError

# Where weights lie in a file, in the order in which they are looked for.
_WRAPPERS = ("model", "state_dict", "block_state_dict", "module", "model_state_dict")
_AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
# What data-parallel and compiled wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")


def read_published(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Reads a state dict from a .pth, .pt or .safetensors file.

    Understood are bare state dicts; those under `model`, `state_dict` or `block_state_dict`
    beside optimisers and arguments; Deep Incubation's `model_stages` (a list of modules, whose
    blocks are numbered through); and the `module.` of data-parallel training.

    Args:
        path: The file.
        ema: Whether to take the moving average of the weights, which such files may hold too.

    Raises:
        CheckpointError: Missing or unreadable; it needs code to be run; or no weights are in it.
    """
    values = _read(path)
    for name in _AVERAGES if ema else _WRAPPERS:
        inner = values.get(name)
        if isinstance(inner, Mapping) and inner:
            values = inner
            break
    else:
        if ema:
            raise CheckpointError(
                f"{path} holds no moving average of the weights ({', '.join(_AVERAGES)}); leave "
                "out --ema"
            )
        if stages := values.get("model_stages"):
            values = _join_stages(stages)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(values)[:8]))
        raise CheckpointError(f"{path} holds no state dict; its keys are {keys or 'none'}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is no file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts store their arguments beside the weights; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except Exception as error:  # torch, zipfile and unpicklers raise many unrelated types
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path} as weights alone: {reason}; files that need code to be run are "
            "not read: save its state dict with torch.save where you trust the file"
        ) from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a state dict")
    return values


def _join_stages(stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole network's names from those of its modules."""
    joined: dict[str, Any] = {}
    first = 0
    for stage in stages:
        count = 0
        for name, value in stage.items():
            if block := _BLOCK.match(name):
                count = max(count, int(block[1]) + 1)
                name = f"blocks.{first + int(block[1])}.{block[2]}"
            joined[name] = value
        first += count
    return joined
