"""How the trained student errs: calibration, confusion, load of its experts, and worst mistakes.

Letters: B batch, C classes, E experts.
"""

import base64
import heapq
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from m2mkd.models.checkpoint import load_model, read_json, write_failure, write_text
from m2mkd.models.nac import NAC
from m2mkd.nn import MoEMlp
from m2mkd.nn.circuit_statistics import circuit_statistics
from m2mkd.train.circuit_pictures import plot_circuit, plot_circuit_history
from m2mkd.train.corruptions import measure_corruptions
from m2mkd.train.data import ImageData
from m2mkd.train.loop import read_metrics
from m2mkd.train.progress import Reporter

GRADES, CORRUPTIONS = "grades.json", "corruptions.json"
HISTORY = "history.png"  # in the folder of the circuits
BINS = 15  # of confidence, all equally wide (Guo et al., arXiv 1706.04599)
_MISTAKES = 12
_MOST_CELLS = 5000  # cells of the confusion matrix that are kept, the fullest first
_PICTURE_SIZE = 128  # pixels; larger images are reduced


def grade_run(run: Path, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Grades the student of a complete run and writes `grades.json` in its folder.

    Returns:
        What the file holds, JSON-able: `digest` (of the graded stage), `count`, `top1` (per cent),
        `ece` (fraction), `bins` (images, mean confidence and accuracy of each confidence bin),
        `classes` (images and correct ones by class), `confusion` ([true, predicted, images], most
        frequent first), `experts` (rows by expert of every MoE layer), `mistakes` (the most
        confident ones, with pictures), `circuits` (of a NAC, see `draw_circuits`).

    Raises:
        CheckpointError: The run is not complete, or the disk is full.
    """
    model, checkpoint = load_model(run)
    grades = grade(model.to(device), data, device)
    grades["circuits"] = draw_circuits(model, run / "circuits")
    if grades["circuits"]:
        plot_circuit_history(read_metrics(run / "end_to_end"), run / "circuits" / HISTORY)
    grades["digest"] = checkpoint.meta.get("digest")
    write_text(run / GRADES, json.dumps(grades))
    return grades


def corrupt_run(
    run: Path, data: ImageData, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Grades the student of a complete run under corruption and writes `corruptions.json`.

    Returns:
        As `measure_corruptions`, and the `digest` of the graded stage.

    Raises:
        CheckpointError: The run is not complete, or the disk is full.
    """
    model, checkpoint = load_model(run)
    model.to(device)

    @torch.inference_mode()
    def predict(images_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = model(images_BCHW.to(device))
        return logits_BC

    found = measure_corruptions(predict, data.validation_batches, reporter)
    found["digest"] = checkpoint.meta.get("digest")
    write_text(run / CORRUPTIONS, json.dumps(found, indent=1))
    return found


def read_corruptions(run: Path) -> dict[str, Any] | None:
    """What `corrupt_run` wrote for the student that the run holds now, else None."""
    return _read_current(run, CORRUPTIONS)


def read_grades(run: Path) -> dict[str, Any] | None:
    """What `grade_run` wrote for the student that the run holds now, else None."""
    return _read_current(run, GRADES)


def _read_current(run: Path, name: str) -> dict[str, Any] | None:
    path, done = run / name, run / "end_to_end" / "DONE"
    if not path.is_file() or not done.is_file():
        return None
    grades = read_json(path)
    return grades if grades.get("digest") == read_json(done).get("digest") else None


@torch.inference_mode()
def grade(model: nn.Module, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Grades a network, as `grade_run` describes, on the validation images."""
    model.eval()
    names = data.class_names
    confusion_CC = np.zeros((len(names), len(names)), dtype=np.int64)
    bins = np.zeros((BINS, 3))  # images, sum of confidence, correct ones
    worst: list[tuple[float, int, dict[str, Any]]] = []
    position = 0
    with expert_rows(model) as experts:
        for images_BCHW, labels_B in data.validation_batches():
            probabilities_BC = model(images_BCHW.to(device)).float().softmax(dim=1).cpu()
            confidence_B, predicted_B = probabilities_BC.max(dim=1)
            _count_bins(bins, confidence_B, predicted_B == labels_B)
            np.add.at(confusion_CC, (labels_B.numpy(), predicted_B.numpy()), 1)
            for row in (predicted_B != labels_B).nonzero().flatten().tolist():
                entry = (float(confidence_B[row]), position + row)
                if len(worst) == _MISTAKES and entry <= worst[0][:2]:
                    continue
                mistake = {
                    "true": int(labels_B[row]),
                    "predicted": int(predicted_B[row]),
                    "confidence": round(entry[0], 4),
                    "confidence_true": round(float(probabilities_BC[row, labels_B[row]]), 4),
                    "where": _where(data, entry[1]),
                    "png": _picture(images_BCHW[row], data.preprocessing),
                }
                heapq.heappush(worst, (*entry, mistake))
                if len(worst) > _MISTAKES:
                    heapq.heappop(worst)
            position += len(labels_B)
    count = int(bins[:, 0].sum())
    return {
        "count": count,
        "top1": round(100.0 * float(bins[:, 2].sum()) / max(1, count), 3),
        "ece": round(float(np.abs(bins[:, 2] - bins[:, 1]).sum()) / max(1, count), 5),
        "bins": [_bin(row) for row in bins],
        "class_names": names,
        "classes": [
            [int(confusion_CC[i].sum()), int(confusion_CC[i, i])] for i in range(len(names))
        ],
        "confusion": _fullest_cells(confusion_CC),
        "experts": experts,
        "mistakes": [entry[2] for entry in sorted(worst, reverse=True)],
    }


def draw_circuits(model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    """Draws the circuits of a NAC's propagators: one for those that hear the inputs, one for those
    that do not.

    Returns:
        `title`, `file` (in `folder`) and `statistics` of each picture; nothing for other networks.

    Raises:
        CheckpointError: A picture cannot be written.
    """
    if not isinstance(model, NAC):
        return []
    layers: dict[bool, list[int]] = {}
    for layer in range(model.depth):
        layers.setdefault(model.hears_inputs(layer), []).append(layer)
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    for numbers in layers.values():
        title = f"Circuit of layer {', '.join(map(str, numbers))}"
        file = f"layer-{numbers[0]:02d}.png"
        circuit = model.circuit(numbers[0])
        plot_circuit(circuit, folder / file, title)
        drawn.append({"title": title, "file": file, "statistics": circuit_statistics(circuit)})
    return drawn


@contextmanager
def expert_rows(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Counts, while it is open, the tokens that every expert of a network takes.

    Yields:
        One entry per MoE layer, in order, filled as images pass: `name`, `rows` (tokens by expert,
        [E]) and `choices` (how many there were before capacity dropped any).
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MoEMlp)]
    entries: list[dict[str, Any]] = [
        {"name": name, "rows": [0] * layer.num_experts, "choices": 0} for name, layer in layers
    ]

    def counter(entry: dict[str, Any]) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, MoEMlp)
            rows = layer.expert_rows(inputs[0]).tolist()
            entry["rows"] = [a + b for a, b in zip(entry["rows"], rows, strict=True)]
            tokens = inputs[0].numel() // inputs[0].shape[-1]
            entry["choices"] += tokens * layer.num_selected

        return count

    handles = [
        layer.register_forward_pre_hook(counter(entry))
        for (_, layer), entry in zip(layers, entries, strict=True)
    ]
    try:
        yield entries
    finally:
        for handle in handles:
            handle.remove()


def _count_bins(bins: np.ndarray[Any, Any], confidence_B: Tensor, correct_B: Tensor) -> None:
    # Bins are (low, high], so that certainty belongs to the last one.
    certain_B = confidence_B.double().numpy()
    index_B = np.clip(np.ceil(certain_B * BINS).astype(int) - 1, 0, BINS - 1)
    np.add.at(bins[:, 0], index_B, 1.0)
    np.add.at(bins[:, 1], index_B, certain_B)
    np.add.at(bins[:, 2], index_B, correct_B.double().numpy())


def _bin(row: np.ndarray[Any, Any]) -> list[float]:
    count = max(1.0, row[0])
    return [int(row[0]), round(float(row[1] / count), 5), round(float(row[2] / count), 5)]


def _fullest_cells(confusion_CC: np.ndarray[Any, Any]) -> list[list[int]]:
    rows, columns = np.nonzero(confusion_CC)
    counts = confusion_CC[rows, columns]
    order = np.lexsort((columns, rows, -counts))[:_MOST_CELLS]
    return [[int(rows[i]), int(columns[i]), int(counts[i])] for i in order]


def _where(data: ImageData, position: int) -> str:
    """Where an image comes from; unreadable images left out earlier would shift the count."""
    return "" if data.bad_images else data.validation.describe(position)


def _picture(image_CHW: Tensor, preprocessing: dict[str, Any]) -> str:
    """What the network saw, as a base64 PNG."""
    mean_C11, std_C11 = (torch.tensor(preprocessing[k]).view(-1, 1, 1) for k in ("mean", "std"))
    pixels_CHW = (image_CHW * std_C11 + mean_C11).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels_HWC = pixels_CHW.permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    if max(image.size) > _PICTURE_SIZE:
        image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
