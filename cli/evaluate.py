"""`m2mkd evaluate`: accuracy of a run or of an exported file on the recipe's validation images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2mkd.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from m2mkd.recipe import DataConfig


@click.command("evaluate")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the data set.  [default: as in the recipe]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(source: Path, root: Path | None, as_json: bool) -> None:
    """Measure the accuracy of SOURCE, a run folder or an ONNX file.

    Both are measured on the validation images of the recipe, which exported files remember.

    Example: m2mkd evaluate quickstart.onnx
    """
    predict, data, class_names = _open_run(source) if source.is_dir() else _open_onnx(source)

    from m2mkd.export.sources import with_root
    from m2mkd.train.data import ImageData
    from m2mkd.train.evaluate import evaluate_logits

    images = ImageData(with_root(data, root), seed=0)
    # An imported network may have come without its data set: then its classes are numbers.
    numbers = [str(i) for i in range(len(class_names))]
    is_known = class_names != numbers or len(images.class_names) != len(class_names)
    if images.class_names != class_names and is_known:
        raise DataError(
            f"the data set has other classes than {source} was trained on: "
            f"{_start(images.class_names)} instead of {_start(class_names)}"
        )
    result = evaluate_logits(predict, images.validation_batches())
    values = {"source": str(source), "top1": result.top1, "top5": result.top5, "loss": result.loss}
    values["count"] = result.count
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo(
            f"{source}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, cross-entropy "
            f"{result.loss:.4f} on {result.count} validation images"
        )


def _open_run(source: Path) -> tuple[Callable[[Any], Any], "DataConfig", list[str]]:
    import torch

    from m2mkd.export.sources import run_data, run_folder
    from m2mkd.models.checkpoint import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = load_model(source)
    run = run_folder(source)
    if run is None:
        raise CheckpointError(f"{source} is not in a run folder, so its data set is not known")
    model = model.to(device)

    @torch.inference_mode()
    def predict(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(images.to(device))
        return logits

    return predict, run_data(run), checkpoint.card.class_names


def _open_onnx(source: Path) -> tuple[Callable[[Any], Any], "DataConfig", list[str]]:
    import torch

    from m2mkd.export.errors import ModelFileError
    from m2mkd.export.session import OnnxClassifier
    from m2mkd.recipe import DataConfig

    classifier = OnnxClassifier(source)
    if classifier.metadata.data is None:
        raise ModelFileError(
            f"{source} does not say what its data set is: it was exported from a checkpoint "
            "outside a run folder; evaluate that checkpoint in its run"
        )

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(classifier.logits(images.numpy()))

    data = DataConfig.model_validate(classifier.metadata.data)
    return predict, data, classifier.metadata.class_names


def _start(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"
