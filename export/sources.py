"""Where a network to export or evaluate comes from: the run around a folder, and its recipe."""

from pathlib import Path
from typing import Any

from m2mkd.errors import ConfigError, DataError
from m2mkd.recipe import DataConfig, load_data

_RECIPE = "recipe.yaml"
_MAX_DEPTH = 3  # a step folder in a baseline's folder in a run


def run_folder(source: Path) -> Path | None:
    """Returns the run that a run, stage or step folder belongs to, or None."""
    folders = [source, *source.absolute().parents[:_MAX_DEPTH]]
    return next((folder for folder in folders if (folder / _RECIPE).is_file()), None)


def run_data(run: Path, stage: str = "end_to_end") -> DataConfig:
    """Returns the data that a stage of a run was trained on, as its recipe has it.

    Args:
        run: The run folder.
        stage: As its checkpoints name it.

    Raises:
        ConfigError: The recipe cannot be read.
    """
    return load_data(run / _RECIPE, stage)


def with_root(data: DataConfig, root: Path | None) -> DataConfig:
    """Returns the data section for the same data set in another folder; None changes nothing.

    Raises:
        ConfigError: The data set is not in a folder.
        DataError: The folder is not there (any more).
    """
    if root is None:
        is_made = data.dataset.startswith("hfds/")  # downloads go there
        if data.root is not None and not is_made and not data.root.expanduser().exists():
            raise DataError(
                f"data set {data.dataset} is not in {data.root}: there is no such folder; say "
                "where it is with --root FOLDER"
            )
        return data
    if data.root is None:
        raise ConfigError(f"data set {data.dataset} comes with m2mkd; leave out --root")
    values: dict[str, Any] = {**data.model_dump(), "root": root}
    return DataConfig.model_validate(values)
