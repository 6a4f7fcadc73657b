"""`report.html`: what a run did and what came out, in one file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

import torch

from m2mkd.errors import DataError, M2MKDError
from m2mkd.recipe import load_recipe
from m2mkd.train.data import ImageData
from m2mkd.train.progress import Reporter
from m2mkd.train.report.grades import corrupt_run, grade_run, read_grades
from m2mkd.train.report.page import write_report

__all__ = ["corrupt_run", "grade_run", "rebuild_report", "refresh_report", "write_report"]


def rebuild_report(runs: Sequence[Path], out: Path, reporter: Reporter) -> Path:
    """Writes the report of runs that exist, and grades their students where nobody has yet.

    Raises:
        CheckpointError: A folder is no run, a file in it is damaged, or `out` cannot be written.
        ConfigError: The runs are not seeds of one recipe.
    """
    for run in runs:
        if (run / "end_to_end" / "DONE").is_file() and read_grades(run) is None:
            recipe = load_recipe(str(run / "recipe.yaml"))
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            try:
                data = ImageData(recipe.data_of("end_to_end"), recipe.seed)
                grade_run(run, data, device)
            except DataError as error:
                reporter.message(f"{run}: no calibration, confusion and expert load: {error}")
    return write_report(runs, out)


def refresh_report(run: Path, reporter: Reporter) -> None:
    """Writes the report of a run under way; what goes wrong is said, and stops nothing."""
    try:
        write_report([run], run / "report.html")
    except M2MKDError as error:  # another job may be writing to a file that is read here
        reporter.message(f"the report is not up to date: {error}")
