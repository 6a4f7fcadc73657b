"""Checkpoint folders: written atomically, verified when read, free of pickled code.

A stage folder holds `step_000500/` folders, each with `model.safetensors` (weights under clean
names), `meta.json` (format, what is needed to rebuild the model, metrics, SHA-256 of the other
files) and, while training goes on, `state.pt` (optimiser state: tensors, numbers and lists only).
`last` and `best` name the newest step and the one with the best validation accuracy; `DONE` says
that the stage is complete.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from m2mkd.errors import CheckpointError
from m2mkd.models.build import create_network
from m2mkd.models.nac import NAC

FORMAT = 1
_WEIGHTS, _STATE, _META = "model.safetensors", "state.pt", "meta.json"


@dataclass
class ModelCard:
    """What is needed to rebuild and use a trained network.

    Attributes:
        model: timm model name.
        model_args: Arguments for it, beyond the fields below.
        depths: Blocks per module.
        num_classes: Outputs of the head.
        image_size: Height and width of its input, in pixels.
        channels: Channels of its input.
        class_names: In the order of the logits.
        preprocessing: timm data config (input_size, interpolation, mean, std, crop_pct, crop_mode).
        recipe: Digest of the recipe that trained it.
        versions: Library versions at training time.
    """

    model: str
    model_args: dict[str, Any]
    depths: list[int]
    num_classes: int
    image_size: int
    channels: int
    class_names: list[str]
    preprocessing: dict[str, Any]
    recipe: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def build(self) -> VisionTransformer | NAC:
        """Creates the network, for weights to be loaded.

        Its own are fresh, and a NAC's signatures describe no graph: fitting them to its prior
        takes seconds, and what is loaded overwrites them.
        """
        without_prior: dict[str, Any] = {"prior": "none"} if self.model.startswith("nac") else {}
        return create_network(
            self.model,
            self.model_args,
            num_classes=self.num_classes,
            image_size=self.image_size,
            channels=self.channels,
            **without_prior,
        )


@dataclass
class Checkpoint:
    """One step folder, read and verified."""

    path: Path
    weights: dict[str, Tensor]
    meta: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """Reads the optimiser state, on the CPU.

        Raises:
            CheckpointError: There is none, or it cannot be read.
        """
        path = self.path / _STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and zipfile raise many unrelated types
            raise CheckpointError(f"cannot read training state {path}: {error}") from error
        return state

    @property
    def stage(self) -> str:
        """Name of the unit of training that made it; that of whole students where none is noted."""
        return str(self.meta.get("stage", "end_to_end"))

    @property
    def card(self) -> ModelCard:
        """The model card, for checkpoints of whole networks.

        Raises:
            CheckpointError: The checkpoint does not hold a whole network.
        """
        try:
            return ModelCard(**self.meta["card"])
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{self.path} holds no whole network (no model card); name a run folder or the "
                "end_to_end folder of one"
            ) from None


def write_checkpoint(
    stage: Path,
    step: int,
    weights: dict[str, Tensor],
    *,
    meta: dict[str, Any],
    state: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `stage/step_NNNNNN` completely or not at all, and points `last` to it.

    Args:
        stage: The stage's folder; made when missing.
        step: Optimiser steps done.
        weights: Tensors by name.
        meta: JSON-able facts; `format`, `step` and `sha256` are added.
        state: Optimiser and schedule state; None for a final checkpoint.
        keep: How many of the newest steps stay, besides the best.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; earlier checkpoints
            stay as they were.
    """
    final = _step_folder(stage, step)
    partial = stage / f".{final.name}.tmp"
    try:
        stage.mkdir(parents=True, exist_ok=True)
        for leftover in stage.glob(".step_*.tmp"):  # of a writer that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial / _WEIGHTS
        )
        if state is not None:
            torch.save(state, partial / _STATE)
        hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        full_meta = {"format": FORMAT, "step": step, **meta, "sha256": hashes}
        hashes[_META] = _sha256_of_meta(full_meta)
        (partial / _META).write_text(json.dumps(full_meta, indent=1, default=str))
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(stage)
        write_text(stage / "last", final.name)
        _forget_old(stage, keep)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if "DataLoader worker" in str(error):
            raise  # torch raises the death of a worker wherever the main process happens to be
        raise write_failure(final, error) from error
    return final


def amend_checkpoint(stage: Path, step: int, facts: dict[str, Any], *, is_best: bool) -> None:
    """Changes facts of the meta.json of a step, its weights left alone.

    Args:
        stage: The stage's folder.
        step: Which step, written before.
        facts: What to add or replace.
        is_best: Whether to point `best` to it.

    Raises:
        CheckpointError: There is no such step, or it cannot be written.
    """
    folder = _step_folder(stage, step)
    meta = {**_read_meta(folder), **facts}
    meta["sha256"][_META] = _sha256_of_meta(meta)
    write_text(folder / _META, json.dumps(meta, indent=1, default=str))
    if is_best:
        write_text(stage / "best", folder.name)


def _step_folder(stage: Path, step: int) -> Path:
    return stage / f"step_{step:06d}"


def write_text(path: Path, text: str) -> None:
    """Replaces a small text file atomically; its folder is made when missing.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written.
    """
    # Jobs of one run may write the same file at the same time, on different machines.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files need not be Unicode.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise write_failure(path, error) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads one step folder and checks it against its own hashes.

    Raises:
        CheckpointError: Missing, foreign, of a newer format, or damaged.
    """
    meta = _read_meta(folder)
    for name, expected in meta["sha256"].items():
        if name == _META:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
        if sha256(path) != expected:
            raise CheckpointError(
                f"checkpoint file {path} is damaged: its SHA-256 differs (removing "
                f"{folder.parent} makes m2mkd train redo that stage)"
            )
    try:
        weights = load_file(folder / _WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder / _WEIGHTS}: {error}") from None
    return Checkpoint(folder, weights, meta)


def newest_checkpoint(stage: Path) -> tuple[Checkpoint | None, list[str]]:
    """Finds the newest readable step of a stage.

    Returns:
        The checkpoint, or None when no step was ever written; and one line for every newer step
        that was passed over because it is damaged.

    Raises:
        CheckpointError: There are steps, and none is readable.
    """
    problems: list[str] = []
    for folder in reversed(_steps(stage)):
        try:
            return read_checkpoint(folder), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no readable checkpoint in {stage} ({problems[0]}); remove that folder to redo the "
            "stage"
        )
    return None, []


def load_model(path: Path) -> tuple[VisionTransformer | NAC, Checkpoint]:
    """Loads the trained student of a run, in eval mode on the CPU.

    Args:
        path: A run folder, a stage folder of a whole network, or one of its step folders.

    Raises:
        CheckpointError: Nothing there, an unfinished run, or weights that do not fit.
    """
    checkpoint = read_checkpoint(_find_step(path))
    model = checkpoint.card.build()
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"weights of {checkpoint.path} do not fit: {detail}") from None
    return model.eval(), checkpoint


def weights_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or that of a run, stage or step folder.

    Raises:
        CheckpointError: A folder without a checkpoint, or nothing there.
    """
    return _find_step(path) / _WEIGHTS if not path.is_file() else path


def newest_meta(stage: Path) -> dict[str, Any]:
    """What the newest step that can be read says of itself, its weights left alone; else {}."""
    for folder in reversed(_steps(stage)):
        try:
            return _read_meta(folder)
        except CheckpointError:
            continue  # whoever reads the weights too will say so
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that m2mkd wrote.

    Raises:
        CheckpointError: It cannot be read or is something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it to redo its stage") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} was not written by m2mkd; remove it to redo its stage")
    return value


def _find_step(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a run folder, such as runs/quickstart")
    if (path / _META).is_file():
        return path
    is_run = (path / "recipe.yaml").is_file()
    stage = path / "end_to_end" if is_run else path
    if is_run and not (stage / "DONE").is_file():
        raise CheckpointError(
            f"run {path} is not finished: its end_to_end stage is not complete; "
            f"run `m2mkd train {path / 'recipe.yaml'} --out {path}` to go on"
        )
    pointer = stage / "last"
    if not pointer.is_file():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint of m2mkd")
    return stage / pointer.read_text(errors="replace").strip()


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / _META
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint of m2mkd: no {_META}")
    meta = read_json(path)
    if not isinstance(meta.get("sha256"), dict):
        raise CheckpointError(f"{path} was not written by m2mkd")
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta.get('format')}, this version reads {FORMAT}; "
            "use the version of m2mkd that wrote it"
        )
    if meta["sha256"].get(_META, "") not in ("", _sha256_of_meta(meta)):
        raise CheckpointError(f"checkpoint file {path} is damaged: its SHA-256 differs")
    return meta


def _sha256_of_meta(meta: dict[str, Any]) -> str:
    """Hash of what a meta.json says, its own hash left out."""
    hashes = {name: value for name, value in meta["sha256"].items() if name != _META}
    # What is read back may differ in type, such as tuples that became lists.
    plain = json.loads(json.dumps({**meta, "sha256": hashes}, default=str))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """The error to raise when `path` could not be written; a full disk is told apart."""
    text = str(error)
    is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    # torch.save reports a full disk as a failed write of its zip container.
    if is_full or "PytorchStreamWriter" in text or "unexpected pos" in text:
        return CheckpointError(
            f"cannot write {path}: the disk is full; free some space and run the same command "
            "again, earlier checkpoints are intact"
        )
    return CheckpointError(f"cannot write {path}: {text.splitlines()[0] if text else error!r}")


def _steps(stage: Path) -> list[Path]:
    found = [folder for folder in stage.glob("step_*") if folder.name[5:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def _forget_old(stage: Path, keep: int) -> None:
    best = stage / "best"
    best_name = best.read_text(errors="replace").strip() if best.is_file() else ""
    for folder in _steps(stage)[:-keep]:
        if folder.name != best_name:
            shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
