"""`m2mkd info`: what is installed, what was compiled and what it runs on."""

import json
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import click

import m2mkd

_LIBRARIES = ("torch", "timm", "accelerate", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show versions, compiled kernels and devices.

    Paste the output into bug reports.

    Example: m2mkd info --json
    """
    facts = {
        "versions": _versions(),
        "kernels": _kernels(),
        "build": _build(),
        "devices": _devices(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for title, values in facts.items():
        click.echo(title)
        for name, value in values.items():
            click.echo(f"  {name:<24} {value}")


def _versions() -> dict[str, str]:
    found = {"m2mkd": m2mkd.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _kernels() -> dict[str, str]:
    with warnings.catch_warnings():
        # The reason for missing kernels is among the facts.
        warnings.simplefilter("ignore")
        from m2mkd.ops import status
    found = status()
    facts = {name: ", ".join(devices) for name, devices in sorted(found["kernels"].items())}
    if found["reason"]:
        facts["missing because"] = found["reason"]
    return facts


def _build() -> dict[str, str]:
    from m2mkd.ops import status

    build: dict[str, str] = status()["build"]
    return build


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return devices
