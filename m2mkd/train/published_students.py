"""A NAC from the published files of its students: where the published code starts end to end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from m2mkd.distill import AssemblyReport, assemble_nac
from m2mkd.errors import CheckpointError
from m2mkd.models import NAC, official
from m2mkd.models.adapt import ClassifierChoice, GridChoice
from m2mkd.models.official_nac import nac_arguments
from m2mkd.models.published import read_published

Config = Mapping[str, Any]


def student_files(folder: Path, depth: int) -> list[Path]:
    """The files of a folder of published students, in the order of the modules.

    Raises:
        CheckpointError: One is missing.
    """
    names = ["ReadInStudent", *(f"MediatorStudent_{i + 1}" for i in range(depth)), "ReadOutStudent"]
    files = [folder / f"{name}.pth" for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}; a NAC of {depth} propagators has {len(files)} "
            "students"
        )
    return files


def assemble_published(
    folder: Path,
    config: Config,
    student_config: Config,
    *,
    grid: GridChoice = "keep",
    classifier: ClassifierChoice = "keep",
) -> tuple[NAC, dict[str, Any], AssemblyReport]:
    """Builds a NAC and puts published students into it.

    Args:
        folder: Holds ReadInStudent.pth, MediatorStudent_1.pth and so on, ReadOutStudent.pth.
        config: The published file of the whole NAC.
        student_config: The published file of its students.
        grid: What becomes of positions for images of another size.
        classifier: What becomes of pooling and classifier.

    Returns:
        The network; its arguments; what moved and what stayed.

    Raises:
        CheckpointError: A file is missing or does not fit.
        ConfigError: A config that does not fit.
    """
    arguments = nac_arguments(config, with_prior=True)
    files = student_files(folder, arguments["depth"])
    kinds = ["nac_readin", *["nac_mediator"] * arguments["depth"], "nac_readout"]
    modules: list[nn.Module] = []
    for path, kind in zip(files, kinds, strict=True):
        try:
            modules.append(official.load(kind, read_published(path), student_config))
        except CheckpointError as error:
            raise CheckpointError(f"{path.name}: {error}") from None
    nac = NAC(**arguments)
    weights = [module.state_dict() for module in modules]
    report = assemble_nac(nac, weights, grid=grid, pooling=classifier)
    return nac.eval(), arguments, report
