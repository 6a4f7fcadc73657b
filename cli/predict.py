"""`m2mkd predict`: classes of image files, from an exported file alone and without PyTorch."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from m2mkd.export.predict import Prediction


@click.command("predict")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    help="Classes to show per image.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def predict(
    context: click.Context, model: Path, images: tuple[Path, ...], top: int, as_json: bool
) -> None:
    """Classify IMAGES, files or folders, with an exported ONNX file.

    Size, cropping, normalisation and class names are read from the file. Images that cannot be
    read are reported at the end, after the answers for all others, and make the exit code 1.

    Example: m2mkd predict quickstart.onnx photos/ --top 3
    """
    from m2mkd.export.predict import predict as classify
    from m2mkd.export.session import OnnxClassifier

    answers = classify(OnnxClassifier(model), images, top=top)
    failed: list[Prediction] = []
    shown: list[Prediction] = []
    for answer in answers:
        (failed if answer.problem else shown).append(answer)
        if not (as_json or sys.stdout.isatty() or answer.problem):
            click.echo(_line(answer))
    if as_json:
        result = {
            "model": str(model),
            "predictions": [answer.to_dict() for answer in shown],
            "failed": [answer.to_dict() for answer in failed],
        }
        click.echo(json.dumps(result, indent=1))
    elif sys.stdout.isatty() and shown:
        _print_table(shown)
    for answer in failed:
        click.echo(f"Error: {answer.problem}", err=True)
    if failed:
        context.exit(1)


def _line(answer: "Prediction") -> str:
    return f"{answer.image}: " + ", ".join(f"{name} {value:.1%}" for name, value in answer.top)


def _print_table(answers: "list[Prediction]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("image")
    for rank in range(1, len(answers[0].top) + 1):
        table.add_column("class" if rank == 1 else f"class {rank}")
        table.add_column("probability", justify="right")
    for answer in answers:
        cells = [text for name, value in answer.top for text in (name, f"{value:.1%}")]
        # Text, because rich would read brackets in names as markup.
        table.add_row(Text(str(answer.image), overflow="fold"), *map(Text, cells))
    Console().print(table)
