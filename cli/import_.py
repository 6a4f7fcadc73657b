"""`m2mkd import`: a published checkpoint becomes a run of ours."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from m2mkd.errors import ConfigError

if TYPE_CHECKING:
    from m2mkd.models.adapt import ClassifierChoice, GridChoice

Kind = Literal["nac", "nac_students", "vmoe", "vit", "nac_readin", "nac_mediator", "nac_readout"]


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    required=True,
    type=click.Choice(get_args(Kind)),
    help="What it is. nac_students: a folder of ReadInStudent.pth, MediatorStudent_N.pth and "
    "ReadOutStudent.pth, put together as a NAC. nac_readin, nac_mediator, nac_readout: one of "
    "them, as a checkpoint for m2mkd.distill.assemble_nac.",
)
@click.option(
    "--config",
    "config_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The YAML file published with it; for vit and vmoe one with their constructors' keys, of "
    "which num_heads or the model's name is enough.",
)
@click.option(
    "--student-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With nac_students: the students' YAML file.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Run folder.")
@click.option(
    "--grid",
    type=click.Choice(["keep", "resize", "reset"]),
    default="keep",
    help="Positions, where the config has images of another size: refuse, interpolate, or start "
    "afresh.",
)
@click.option(
    "--classifier",
    type=click.Choice(["keep", "reset"]),
    default="keep",
    help="Classifier, where the config has other classes: refuse, or start afresh.",
)
@click.option("--ema", is_flag=True, help="Take the moving average of the weights.")
@click.option(
    "--dataset",
    help="What `m2mkd evaluate` measures it on, as in recipes.  [default: the config's, or "
    "image_folder]",
)
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the data set.  [default: the config's data_path]",
)
@click.option("--set", "overrides", multiple=True, metavar="data.KEY=VALUE", help="Preparation.")
@click.option("--json", "as_json", is_flag=True, help="Print what became of every tensor.")
def import_(
    source: Path,
    kind: Kind,
    config_file: Path,
    student_config: Path | None,
    out: Path,
    grid: "GridChoice",
    classifier: "ClassifierChoice",
    ema: bool,
    dataset: str | None,
    root: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert SOURCE, a checkpoint of the published code, to a run.

    Every tensor is placed, or the command fails and lists those that were not. Files are read as
    weights alone; nothing in them is run.

    \b
    Example: m2mkd import checkpoint_best.pt --kind nac --config nac_scale.yml -o runs/nac
    """
    if (kind == "nac_students") != (student_config is not None):
        raise click.UsageError("--student-config goes with --kind nac_students, and with no other")
    if kind == "nac_students" and ema:
        raise click.UsageError("published students have no moving average; leave out --ema")
    config = _read_config(config_file, "nac" if kind == "nac_students" else kind)
    facts: dict[str, Any] = {"source": str(source), "kind": kind, "config": config}
    facts |= {"grid": grid, "classifier": classifier, "ema": ema}
    if kind.startswith("nac_") and kind != "nac_students":
        _import_module(source, kind, config, out, facts, ema=ema)
    else:
        students = None if student_config is None else _read_config(student_config, "nac_readin")
        data = {"dataset": dataset, "root": root, "overrides": overrides}
        _import_network(source, kind, config, students, out, facts, data)
    click.echo(json.dumps(facts, indent=1, default=str) if as_json else _summary(out, facts))


def _import_network(
    source: Path,
    kind: Kind,
    config: dict[str, Any],
    student_config: dict[str, Any] | None,
    out: Path,
    facts: dict[str, Any],
    data_args: dict[str, Any],
) -> None:
    """Converts a whole network; adds to `facts` what became of its tensors."""
    from m2mkd.models import official
    from m2mkd.models.published import read_published
    from m2mkd.train.imported import class_names_of, published_data, square, write_imported_run
    from m2mkd.train.published_students import assemble_published

    choices = {"grid": facts["grid"], "classifier": facts["classifier"]}
    if student_config is not None:
        network, arguments, report = assemble_published(source, config, student_config, **choices)
        model, depths = "nac", [1] * (arguments["depth"] + 2)
        facts |= {"transferred": report.transferred, "dropped": report.dropped}
        facts["fresh"] = report.untouched
        placed = sum(report.transferred)
        weights = network.state_dict()
    else:
        state = read_published(source, ema=facts["ema"])
        model, arguments, depths = official.describe(kind, state, config)
        loaded: Any = official.load(kind, state, config, **choices)
        facts |= {"placed": loaded.loaded_tensors, "fresh": loaded.fresh_tensors}
        placed, weights = len(loaded.loaded_tensors), loaded.state_dict()
    data = published_data(
        config,
        image_size=square(arguments["img_size"]),
        channels=arguments["in_chans"],
        **data_args,
    )
    names = class_names_of(data, arguments["num_classes"])
    facts |= {"num_placed": placed, "class_names_known": names is not None}
    write_imported_run(
        out,
        model=model,
        arguments=arguments,
        depths=depths,
        weights=weights,
        data=data,
        class_names=names,
        facts=facts,
    )


def _import_module(
    source: Path, kind: Kind, config: dict[str, Any], out: Path, facts: dict[str, Any], *, ema: bool
) -> None:
    """Converts one student module; adds to `facts` what became of its tensors."""
    from m2mkd.models import official
    from m2mkd.models.checkpoint import write_checkpoint
    from m2mkd.models.published import read_published

    module: Any = official.load(kind, read_published(source, ema=ema), config)
    facts |= {"placed": module.loaded_tensors, "num_placed": len(module.loaded_tensors)}
    facts["fresh"] = []
    write_checkpoint(out, 0, module.state_dict(), meta={"stage": "module", **facts})


def _read_config(path: Path, kind: str) -> dict[str, Any]:
    import yaml

    from m2mkd.models.official_config import check_keys

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} is not a YAML mapping of keys to values")
    try:
        check_keys(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def _summary(out: Path, facts: dict[str, Any]) -> str:
    lines = [f"{out}: {facts['num_placed']} tensors of {facts['source']} placed"]
    if facts["fresh"]:
        lines.append(f"started afresh: {', '.join(facts['fresh'])}")
    if facts.get("dropped"):
        lines.append(f"left out: {', '.join(facts['dropped'])}")
    if facts.get("class_names_known") is False:
        lines.append("the data set is not here, so classes are numbered; give --root to name them")
    return "\n".join(lines)
