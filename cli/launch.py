"""`m2mkd launch`: a recipe becomes a chain of SLURM jobs."""

from pathlib import Path

import click


@click.command(short_help="Queue a run's stages as SLURM jobs.")
@click.argument("recipe")
@click.option("--slurm", is_flag=True, required=True, help="Submit through SLURM (submitit).")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option("--partition", help="SLURM partition.")
@click.option("--account", help="SLURM account.")
@click.option("--qos", help="SLURM quality of service.")
@click.option("--constraint", help="Node features asked for.")
@click.option(
    "--time", "minutes", type=click.IntRange(5), default=720, help="Minutes a job may take at once."
)
@click.option("--nodes", type=click.IntRange(1), default=1, help="Machines for whole networks.")
@click.option("--gpus", type=click.IntRange(0), default=1, help="GPUs a machine for these.")
@click.option("--cpus", type=click.IntRange(1), default=8, help="CPU cores a process.")
@click.option("--mem", "memory", type=click.IntRange(1), help="GB of memory a machine.")
@click.option("--at-once", type=click.IntRange(1), default=8, help="Pairs running at a time.")
@click.option("--setup", multiple=True, metavar="LINE", help="Shell line before the start.")
@click.option("--dry-run", is_flag=True, help="Show the batch scripts; submit nothing.")
def launch(
    recipe: str,
    slurm: bool,
    out: Path | None,
    overrides: tuple[str, ...],
    partition: str | None,
    account: str | None,
    qos: str | None,
    constraint: str | None,
    minutes: int,
    nodes: int,
    gpus: int,
    cpus: int,
    memory: int | None,
    at_once: int,
    setup: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Queue RECIPE's stages as SLURM jobs: meta, teacher, one job a pair, end to end, evaluate.

    Each job waits for those it needs. One that runs out of time saves and is queued again.

    \b
    Example: m2mkd launch my.yaml --slurm --partition gpu --gpus 4 --setup "module load cuda"
    """
    from m2mkd.recipe import load_recipe
    from m2mkd.train.launch import Resources
    from m2mkd.train.launch import launch as launch_run
    from m2mkd.train.progress import Reporter
    from m2mkd.train.run import Run

    settings = load_recipe(recipe, overrides)
    resources = Resources(
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        minutes=minutes,
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
        at_once=at_once,
        setup=setup,
    )
    run = Run(settings, out or Path("runs") / settings.name, Reporter())
    jobs = launch_run(run, resources, click.echo if dry_run else None)
    if not dry_run:
        for stage, job in jobs.items():
            click.echo(f"{stage:<12} job {job}")
