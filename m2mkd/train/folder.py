"""What stages leave in their folders, read by the stages after them."""

import json
from pathlib import Path

from torch import Tensor

from m2mkd.distill import pair_name
from m2mkd.errors import CheckpointError
from m2mkd.models.checkpoint import newest_checkpoint, read_json
from m2mkd.train.loop import read_metrics


def digest_of(folder: Path) -> str | None:
    """Digest that a stage folder was made for, or None when there is nothing in it."""
    done = folder / "DONE"
    if done.is_file():
        return str(read_json(done).get("digest"))
    checkpoint, _ = newest_checkpoint(folder)
    return None if checkpoint is None else str(checkpoint.meta.get("digest"))


def last_checkpoint(folder: Path) -> Path:
    """The step folder that a stage's `last` points to.

    Raises:
        CheckpointError: The stage was never trained.
    """
    pointer = folder / "last"
    if not pointer.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint; run that stage first")
    return folder / pointer.read_text(errors="replace").strip()


def holds_facts(path: Path, digest: str) -> bool:
    """Whether a file of facts about a stage can be read and is of these settings."""
    try:
        return bool(read_json(path).get("digest") == digest)
    except CheckpointError:  # none yet, or damaged
        return False


def weights_of_pair(weights: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Weights of one module under its own names (`pair-00.blocks...` -> `blocks...`)."""
    prefix = f"{pair_name(index)}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def metrics_of_pair(joint: Path, name: str) -> str:
    """Lines of a joint metrics.jsonl with one pair's loss and accuracy, as if trained alone."""
    kept = []
    for line in read_metrics(joint):
        own = {k: v for k, v in line.items() if k in ("step", "epoch", "lr")}
        own |= {k: v for k, v in line.items() if k.startswith(name)}
        kept.append(json.dumps({**own, "loss": line[f"{name}/loss"]}) + "\n")
    return "".join(kept)
