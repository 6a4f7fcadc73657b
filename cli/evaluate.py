"""`m2mkd evaluate`: accuracy, robustness and features of a run; accuracy of an exported file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2mkd.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from m2mkd.recipe import DataConfig
    from m2mkd.train.data import ImageData

_FewShot = tuple[int, int]


def _parse_few_shot(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> _FewShot | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", value)
    if found is None or int(found[1]) < 2 or int(found[2]) < 1:
        raise click.BadParameter(f"{value!r} is not WAYSxSHOTS, such as 8x5")
    return int(found[1]), int(found[2])


@click.command("evaluate")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the data set.  [default: as in the recipe]",
)
@click.option(
    "--data",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe's data section, such as dataset=imagenet_r.",
)
@click.option("--corruptions", is_flag=True, help="Damaged images: 9 kinds, severity 1 to 5.")
@click.option(
    "--few-shot",
    metavar="WAYSxSHOTS",
    callback=_parse_few_shot,
    help="New head for a few classes and images, such as 8x5; the rest is frozen.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    default=10,
    help="Random draws of classes and images for --few-shot.",
)
@click.option("--linear-probe", is_flag=True, help="New head on frozen features, all images.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    source: Path,
    root: Path | None,
    overrides: tuple[str, ...],
    corruptions: bool,
    few_shot: _FewShot | None,
    draws: int,
    linear_probe: bool,
    as_json: bool,
) -> None:
    """Measure the accuracy of SOURCE, a run folder or an ONNX file.

    Both are measured on the validation images of the recipe, which exported files remember. On a
    data set with some of the classes only, such as ImageNet-R, the answer is the best of these.

    \b
    Example: m2mkd evaluate quickstart.onnx
    Example: m2mkd evaluate RUN --data dataset=cifar100 --data root=cifar --few-shot 8x5
    """
    if sum((corruptions, few_shot is not None, linear_probe)) > 1:
        raise click.UsageError("--corruptions, --few-shot and --linear-probe exclude each other")
    if not source.is_dir() and (few_shot or linear_probe):
        raise click.UsageError("--few-shot and --linear-probe need a run, not an ONNX file")

    opened = _open_run(source) if source.is_dir() else _open_onnx(source)
    data = _open_data(opened, source, root, overrides)
    if root or overrides:
        opened.run = None
    values: dict[str, Any] = {"source": str(source)}
    if few_shot or linear_probe:
        lines = _probe(opened, data, values, few_shot, draws)
    else:
        lines = _grade(opened, data, values, corruptions)
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo("\n".join(lines).replace("SOURCE", str(source)))


class _Opened:
    """A network to evaluate, with what it remembers of its data."""

    def __init__(
        self,
        predict: Callable[[Any], Any],
        data: "DataConfig",
        class_names: list[str],
        model: Any = None,
        run: Path | None = None,
    ) -> None:
        self.predict = predict
        self.data = data
        self.class_names = class_names
        self.model = model
        self.run = run  # the run whose student this is, to be graded on its own data


def _open_data(
    opened: _Opened, source: Path, root: Path | None, overrides: tuple[str, ...]
) -> "ImageData":
    from m2mkd.export.sources import with_root
    from m2mkd.recipe import make_data
    from m2mkd.train.data import ImageData

    config = opened.data
    if overrides:
        values = {"data": config.model_dump(mode="json")}
        config = make_data(
            values, source=str(source), overrides=tuple(f"data.{item}" for item in overrides)
        )
        for key in ("image_size", "channels"):
            ours, asked = getattr(opened.data, key), getattr(config, key)
            if ours != asked:
                raise ConfigError(
                    f"--data {key}={asked}: {source} takes {key} {ours}; images are converted to it"
                )
    return ImageData(with_root(config, root), seed=0)


def _grade(
    opened: _Opened, data: "ImageData", values: dict[str, Any], corruptions: bool
) -> list[str]:
    """Accuracy on the validation images, also damaged ones."""
    from m2mkd.train.evaluate import evaluate_logits, restricted

    predict = restricted(opened.predict, opened.class_names, data.class_names)
    if corruptions:
        return _grade_damaged(opened, predict, data, values)
    result = evaluate_logits(predict, data.validation_batches())
    values |= {"top1": result.top1, "top5": result.top5, "loss": result.loss}
    values["count"] = result.count
    some = ""
    if len(data.class_names) < len(opened.class_names):
        values["classes"] = len(data.class_names)
        some = f" of {len(data.class_names)} of its {len(opened.class_names)} classes"
    return [
        f"SOURCE: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, cross-entropy "
        f"{result.loss:.4f} on {result.count} validation images{some}"
    ]


def _grade_damaged(
    opened: _Opened, predict: Callable[[Any], Any], data: "ImageData", values: dict[str, Any]
) -> list[str]:
    import torch

    from m2mkd.train.corruptions import SEVERITIES, measure_corruptions
    from m2mkd.train.progress import Reporter
    from m2mkd.train.report import corrupt_run

    with Reporter() as reporter:
        if opened.run is not None:  # kept for the report
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            found = corrupt_run(opened.run, data, device, reporter)
        else:
            found = measure_corruptions(predict, data.validation_batches, reporter)
    values |= found
    lines = [
        f"SOURCE: top-1 on {found['count']} validation images, clean {found['clean']:.2f} %, "
        f"damaged {found['mean']:.2f} % on the average",
        f"{'severity':<16}" + "".join(f"{severity:>7}" for severity in SEVERITIES),
    ]
    for kind, row in found["top1"].items():
        lines.append(f"{kind:<16}" + "".join(f"{value:>7.1f}" for value in row))
    return lines


def _probe(
    opened: _Opened,
    data: "ImageData",
    values: dict[str, Any],
    few_shot: _FewShot | None,
    draws: int,
) -> list[str]:
    """A new head on the frozen network: few-shot episodes, or linear probing."""
    import torch

    from m2mkd.errors import DataError
    from m2mkd.train import probe

    if not len(data.train):
        raise DataError(
            "this data set is for evaluation only: a new head needs training images; arrange it as "
            "train/CLASS/* and val/CLASS/* and set --data dataset=image_folder"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if few_shot is None:
        found = probe.linear_probe(opened.model, data, device)
        values |= found
        return [
            f"SOURCE: linear probe top-1 {found['top1']:.2f} % on {found['count']} validation "
            f"images ({found['train_top1']:.2f} % on the training images)"
        ]
    ways, shots = few_shot
    result = probe.few_shot(opened.model, data, device, ways=ways, shots=shots, draws=draws)
    values |= {
        "ways": ways,
        "shots": shots,
        "top1": result.mean,
        "half_width_95": result.half_width,
        "draws": [
            {"top1": top1, "classes": names}
            for top1, names in zip(result.accuracies, result.classes, strict=True)
        ],
    }
    spread = f" ± {result.half_width:.2f} (95 %, {draws} draws)" if draws > 1 else ""
    return [
        f"SOURCE: {ways}-way {shots}-shot top-1 {result.mean:.2f} %{spread}; "
        f"first draw, as published: {result.accuracies[0]:.2f} %"
    ]


def _open_run(source: Path) -> _Opened:
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

    is_whole_run = run.absolute() == source.absolute()
    own = source if is_whole_run else None
    data = run_data(run, checkpoint.stage)
    return _Opened(predict, data, checkpoint.card.class_names, model, own)


def _open_onnx(source: Path) -> _Opened:
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
    return _Opened(predict, data, classifier.metadata.class_names)
