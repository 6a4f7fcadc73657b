"""`m2mkd report`: one HTML page about a run, or about several seeds of one recipe."""

from pathlib import Path

import click


@click.command("report")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    metavar="RUN [RUN ...]",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write.  [default: RUN/report.html; report.html for several runs]",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page of curves, accuracies, gains, expert load, calibration and cost.

    The page is one file that loads nothing from anywhere. A run that is not finished, or still
    going on, gives a page of what there is so far. Several runs that differ in their seed alone
    are shown together, with the spread of what m2mKD gained.

    Example: m2mkd report runs/quickstart-0 runs/quickstart-1 runs/quickstart-2 -o seeds.html
    """
    from m2mkd.train.progress import Reporter
    from m2mkd.train.report import rebuild_report

    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    with Reporter() as reporter:
        click.echo(rebuild_report(runs, out or default, reporter))
