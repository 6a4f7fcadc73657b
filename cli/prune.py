"""`m2mkd prune`: a NAC with fewer mediators, as a run of its own."""

import json
from pathlib import Path
from typing import Any

import click


@click.command("prune")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--mediators", type=float, metavar="SHARE", help="Share of the mediators to keep.")
@click.option(
    "--budget", type=float, metavar="POINTS", help="Or: top-1 points that may be lost at most."
)
@click.option(
    "--inputs", type=float, default=1.0, metavar="SHARE", help="Share of the input latents to keep."
)
@click.option(
    "--outputs", type=float, default=1.0, metavar="SHARE", help="The same of the output latents."
)
@click.option(
    "--layers", type=float, default=1.0, metavar="SHARE", help="Share of the propagators to keep."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    help="Run folder to write.  [default: SOURCE-pruned]",
)
@click.option(
    "--finetune", type=int, default=0, metavar="EPOCHS", help="Train for so long afterwards."
)
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the data set.  [default: as in the recipe]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(
    source: Path,
    mediators: float | None,
    budget: float | None,
    inputs: float,
    outputs: float,
    layers: float,
    out: Path | None,
    finetune: int,
    root: Path | None,
    as_json: bool,
) -> None:
    """Remove mediators from SOURCE, the run of a NAC, those with the least traffic first.

    Inputs, outputs and layers only go where a share of them is given. Accuracy on the recipe's
    validation images, latency and operations are measured for several numbers of mediators; the
    folder of the new run holds the curve as pruning.json and pruning.png.

    \b
    Example: m2mkd prune runs/nac_fashion --mediators 0.25
    """
    if (mediators is None) == (budget is None):
        raise click.UsageError("give either --mediators or --budget")

    from m2mkd.errors import CheckpointError
    from m2mkd.export.sources import run_data, run_folder, with_root
    from m2mkd.train.progress import Reporter
    from m2mkd.train.prune import prune_run

    run = run_folder(source)
    if run is None:
        what = "is not in a run folder, so its data set is not known"
        raise CheckpointError(f"{source} {what if source.exists() else 'does not exist'}")
    out = out or source.absolute().with_name(f"{source.absolute().name}-pruned")
    with Reporter() as reporter:
        result = prune_run(
            source,
            run / "recipe.yaml",
            with_root(run_data(run), root),
            out,
            reporter,
            mediators=mediators,
            budget=budget,
            inputs=inputs,
            outputs=outputs,
            layers=layers,
            finetune=finetune,
        )
    click.echo(json.dumps(result, indent=1) if as_json else _describe(result, out))


def _describe(result: dict[str, Any], out: Path) -> str:
    full, pruned, tuned = result["full"], result["pruned"], result["finetuned"]
    kept = ", ".join(
        f"{pruned[kind]} of {full[kind]} {kind}"
        for kind in ("mediators", "inputs", "outputs", "layers")
        if kind == "mediators" or pruned[kind] < full[kind]
    )
    lines = [f"{kept} kept: top-1 {pruned['top1']:.2f} %, before {full['top1']:.2f} %"]
    if tuned is not None:
        lines.append(f"after {tuned['epochs']} epochs of training: top-1 {tuned['top1']:.2f} %")
    lines += [
        f"circuit: {full['circuit_ms'] / pruned['circuit_ms']:.2f} times faster for one image, "
        f"{full['circuit_ms_per_image'] / pruned['circuit_ms_per_image']:.2f} times in a batch, "
        f"{full['circuit_flops'] / pruned['circuit_flops']:.2f} times fewer operations",
        f"run: {out}, curve: {out / 'pruning.png'}",
    ]
    return "\n".join(lines)
