"""`m2mkd train`: a recipe becomes a distilled, trained and graded student."""

import json
import os
from pathlib import Path
from typing import Any

import click

from m2mkd.train.plan import STAGES
from m2mkd.train.stopping import Interrupted, Preempted, StopRequest, stopping_on_signals


@click.command(short_help="Train a student from a recipe.")
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option("--stage", type=click.Choice(STAGES), help="Run only this stage.")
@click.option("--from-stage", type=click.Choice(STAGES), help="Redo from this stage on.")
@click.option("--pair", type=int, help="With --stage distill: train only this pair.")
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Go on with what is in the run folder, or set it aside and start over.",
)
@click.option("--wait", is_flag=True, help="Wait for stages that other jobs are working on.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(
    recipe: str,
    out: Path | None,
    overrides: tuple[str, ...],
    stage: str | None,
    from_stage: str | None,
    pair: int | None,
    resume: bool,
    wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a student from RECIPE, a built-in name or a YAML file.

    Stages that are complete are skipped and interrupted ones go on where they stopped, so the same
    command can be given again at any time.

    \b
    Example: m2mkd train quickstart --set seed=1 --out runs/quickstart-1
    """
    if pair is not None and stage != "distill":
        raise click.UsageError("--pair goes with --stage distill")
    if stage and not resume:
        raise click.UsageError("--stage and --fresh exclude each other")
    if stage and from_stage:
        raise click.UsageError("--stage and --from-stage exclude each other")
    once = "" if resume and from_stage is None else ", without --fresh and --from-stage,"

    stop = StopRequest()
    with stopping_on_signals(stop):  # from here on, loading the libraries takes seconds
        from m2mkd.recipe import load_recipe
        from m2mkd.train.execute import train as run_recipe
        from m2mkd.train.progress import Reporter
        from m2mkd.train.run import Run
        from m2mkd.train.world import leave_world

        settings = load_recipe(recipe, overrides)
        out = out or Path("runs") / settings.name
        with Reporter(quiet=os.environ.get("RANK", "0") != "0") as reporter:
            if dry_run:
                click.echo(_describe(Run(settings, out, reporter)))
                return
            try:
                summary = run_recipe(
                    settings,
                    out,
                    reporter,
                    stage=stage,
                    from_stage=from_stage,
                    pair=pair,
                    fresh=not resume,
                    wait=wait,
                    stop=stop,
                )
            except Preempted as stopped:
                reporter.message(f"{stopped}; state saved, queue the same command again{once}")
                summary = None
            except Interrupted as stopped:
                reporter.message(f"{stopped}; the same command{once} goes on from there")
                raise
    if summary is not None:
        click.echo(json.dumps(summary, indent=1) if as_json else _table(summary, out))
    leave_world()


def _describe(run: Any) -> str:
    """The plan of a run: networks, then one line a stage."""
    networks = run.networks
    lines = [
        f"run folder {run.out}",
        f"data       {_describe_data(run, 'distill')}",
        f"teacher    {run.recipe.teacher.model}, modules {networks.teacher_depths}, "
        f"{networks.parameters['teacher']:,} parameters",
        f"student    {run.recipe.student.model}, modules {networks.student_depths}, "
        f"{networks.parameters['student']:,} parameters",
    ]
    if run.recipe.end_to_end_data is not None:
        lines.insert(2, f"end to end {_describe_data(run, 'end_to_end')}")
    for name, plan in run.plan.items():
        epochs = plan.schedule.epochs if plan.schedule else 0
        steps = epochs * run.data_of(name).steps_per_epoch
        state = "complete" if run.is_done(name) else "to do"
        lines.append(f"{name:<26} {epochs:>4} epochs {steps:>7} steps  {state}")
    return "\n".join(lines)


def _describe_data(run: Any, stage: str) -> str:
    data = run.data_of(stage)
    return (
        f"{run.recipe.data_of(stage).dataset}: {len(data.train)} training and "
        f"{len(data.validation)} validation images, {data.num_classes} classes; "
        f"{data.images_per_step} images a step"
    )


def _table(summary: dict[str, Any], out: Path) -> str:
    """The accuracies of a run, one line each, with what m2mKD gained over each baseline."""
    accuracy, epochs = summary["accuracy"], summary["epochs"]
    other = summary["pairs_data"]
    where = f", {other['validation_images']} of {other['dataset']}" if other else ""
    short, long = epochs["end_to_end"], epochs["end_to_end"] + epochs["distill"]
    names = {
        "meta": f"meta model{where}",
        "teacher": f"teacher{where}",
        "assembled": "m2mKD, right after assembly",
        "m2mkd": f"m2mKD, {epochs['distill']} + {short} epochs",
        "end_to_end_only": f"end to end only, {short} epochs",
        "equal_updates": f"end to end only, {long} epochs",
        "logit_kd": f"logit KD, {short} epochs",
    }
    lines = [
        f"{summary['recipe']}, seed {summary['seed']}: top-1 on "
        f"{summary['validation_images']} held-out images"
    ]
    for key, text in names.items():
        if key not in accuracy:
            continue
        gain = f"   m2mKD {summary['gain'][key]:+.2f}" if key in summary["gain"] else ""
        lines.append(f"  {text:<32} {accuracy[key]:6.2f} %{gain}")
    hybrids = {
        "hybrids_unaligned": "the same before alignment",
        "teacher_hybrids": "meta with one teacher module",
        "student_hybrids": "meta with one student module",
    }
    for key, text in hybrids.items():
        if key in accuracy:
            values = " ".join(f"{value:.1f}" for value in accuracy[key])
            lines.append(f"  {text:<32} {values}")
    lines.append(f"results: {out}/summary.json, report: {out}/report.html")
    return "\n".join(lines)
