"""`m2mkd info`: what is installed, what was compiled and what it runs on."""

import json
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

import m2mkd
from m2mkd.errors import KernelError

_LIBRARIES = ("torch", "timm", "accelerate", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--selftest", is_flag=True, help="Compare every compiled kernel with its reference instead."
)
def info(as_json: bool, selftest: bool) -> None:
    """Show versions, compiled kernels and devices.

    Paste the output into bug reports. With --selftest, run each kernel and its gradients on every
    device that is present and show how far it is from its plain PyTorch reference; exit code 1 if
    one is too far.

    Example: m2mkd info --selftest
    """
    if selftest:
        _selftest(as_json)
        return
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


def _selftest(as_json: bool) -> None:
    """Prints kernel, result and largest error by device; raises where a kernel is wrong."""
    findings = _findings()
    if as_json:
        values = {
            device: {name: finding._asdict() for name, finding in found.items()}
            for device, found in findings.items()
        }
        click.echo(json.dumps(values, indent=1))
    else:
        for device, found in findings.items():
            click.echo(f"{device:<30} {'result':<10} largest error, of the largest value")
            for name, finding in found.items():
                result = "MISMATCH" if finding.problem else "ok"
                line = f"  {name:<28} {result:<10} {finding.error:.1e}  {finding.problem}"
                click.echo(line.rstrip())
    wrong = [
        f"{name} on {device}"
        for device, found in findings.items()
        for name, finding in found.items()
        if finding.problem
    ]
    if wrong:
        raise KernelError(
            f"kernels disagree with their references: {', '.join(wrong)}; please report this with "
            "the output of `m2mkd info`, and set M2MKD_NO_EXTENSION=1 to work without them"
        )


def _findings() -> dict[str, dict[str, Any]]:
    """What `m2mkd.ops.selftest` finds on each device that has kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from m2mkd.ops import selftest, status
    import torch

    found = status()
    served = {device for devices in found["kernels"].values() for device in devices}
    if not served:
        raise KernelError(f"there are no compiled kernels to test: {found['reason']}")
    devices = ["cpu"]
    if "cuda" in served:
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {device: selftest(device) for device in devices}


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
