"""`m2mkd export`: a trained network becomes an ONNX file that was compared with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from m2mkd.export.exporter import Exported


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="ONNX file."
)
@click.option(
    "--target",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    help="Runtime it is meant for: cuda writes experts as one operator with CUDA kernels "
    "(com.microsoft.MoE), cpu as standard operators, which are faster on a CPU.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    help="Of weights and arithmetic; input, output and routers stay fp32.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0, min_open=True),
    show_default="1e-4, for fp16 3e-2",
    help="Accepted difference of logits from PyTorch's, as a fraction of the largest.",
)
@click.option("--no-verify", is_flag=True, help="Write the file unchecked.")
@click.option("--json", "as_json", is_flag=True, help="Print what the file says about itself.")
def export(
    source: Path,
    out: Path,
    target: Literal["cuda", "cpu"],
    precision: Literal["fp32", "fp16"],
    tolerance: float | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write the network of SOURCE, a run or checkpoint folder, as ONNX.

    The file is compared with PyTorch on held-out images of the run, or on noise where it has none,
    with several batch sizes. If anything differs nothing is written and the exit code is 1.

    Example: m2mkd export runs/quickstart -o quickstart.onnx --target cpu
    """
    if no_verify and tolerance is not None:
        raise click.UsageError("--tolerance is for verification, which --no-verify leaves out")

    from m2mkd.cli.main import is_verbose
    from m2mkd.export.exporter import export_run

    exported = export_run(
        source,
        out,
        target=target,
        precision=precision,
        tolerance=tolerance,
        verify=not no_verify,
        verbose=is_verbose(),
    )
    if no_verify:
        click.echo(
            f"WARNING: {out} was NOT verified: nothing shows that it computes what the trained "
            "network does. Export again without --no-verify before using it.",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(_facts(exported), indent=1))
    else:
        click.echo(_summary(exported))


def _facts(exported: "Exported") -> dict[str, object]:
    return {
        "files": [str(path) for path in exported.files],
        "bytes": sum(path.stat().st_size for path in exported.files),
        "operators": exported.operators,
        "metadata": {
            key.removeprefix("m2mkd."): json.loads(value)
            for key, value in exported.metadata.to_props().items()
        },
    }


def _summary(exported: "Exported") -> str:
    metadata = exported.metadata
    size = sum(path.stat().st_size for path in exported.files) / 1e6
    experts = {"contrib": ", experts as com.microsoft.MoE", "sorted": ", experts as sorted rows"}
    lines = [
        f"{' and '.join(map(str, exported.files))}: {metadata.model}, {metadata.precision}, "
        f"{size:.1f} MB, opset {metadata.opset}{experts.get(metadata.moe_form or '', '')}, "
        f"for ONNX Runtime {metadata.min_onnxruntime} or later"
    ]
    parity = metadata.parity
    if parity is None:
        return lines[0]
    inputs = {"samples": "held-out images", "noise": "noise images"}[parity["inputs"]]
    lines.append(
        f"verified on {parity['images']} {inputs} with {parity['provider']} of ONNX Runtime "
        f"{parity['runtime']}: logits differ by at most {parity['max_difference']:.1e} of the "
        f"largest (accepted: {parity['tolerance']:.1e}), same best class for {parity['agreeing']} "
        f"of {parity['clear']} images with a clear one"
    )
    if parity["excused"]:
        lines.append(
            f"{parity['excused']} more images differ further, where a router was undecided between "
            "two experts to within rounding"
        )
    if metadata.moe_form == "contrib" and metadata.activation == "gelu":
        lines.append(
            "note: the experts were trained with the erf form of GELU; com.microsoft.MoE computes "
            "the tanh form on CPUs"
        )
    return "\n".join(lines)
