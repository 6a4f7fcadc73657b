"""Loads the operator libraries once, and says in one warning why where it cannot.

`_ops_cpu` holds the schemas and the CPU kernels, `_ops_cuda` the CUDA kernels; neither contains
Python. Where they are missing, every op runs on its reference.
"""

import os
import re
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
CUDA_LIBRARY = _PACKAGE / "_ops_cuda.so"
_BUILD = "run `pip install --no-build-isolation -e .` in the checkout"


class ExtensionWarning(UserWarning):
    """The compiled kernels, or some of them, are not in use."""


@dataclass(frozen=True)
class Extension:
    """Which libraries are loaded, and why others are not.

    Attributes:
        cpu: Whether the schemas and CPU kernels are loaded.
        cuda: Whether the CUDA kernels are loaded.
        reason: Why something is not loaded and what to do, or an empty string.
    """

    cpu: bool
    cuda: bool
    reason: str


def build_info() -> dict[str, str]:
    """Facts about the build from `m2mkd._C`; empty where it was not built for this Python."""
    try:
        return dict(import_module("m2mkd._C").build_info())
    except ImportError:
        return {}


def _installed_elsewhere(name: str) -> Path | None:
    """The library in an installed wheel that is not the m2mkd being imported."""
    try:
        files = metadata.files("m2mkd") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.exists() and path.parent.resolve() != _PACKAGE:
            return path.parent
    return None


def _missing(name: str) -> str:
    """Why library `name` is not beside this package, and what to do."""
    elsewhere = _installed_elsewhere(name)
    if elsewhere is not None:
        return (
            f"m2mkd was imported from {_PACKAGE}, which has no built extension, while an installed "
            f"one with it lies in {elsewhere}; run from another directory, or {_BUILD}"
        )
    others = sorted(path.name for path in _PACKAGE.glob("_C*.so"))
    if others:
        return f"the extension was built only in part ({', '.join(others)}, no {name}); {_BUILD}"
    return f"the extension was never built; {_BUILD}"


def _torch_release() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def _unfit(name: str, error: str) -> str:
    """Why library `name` does not load, and what to do."""
    facts = build_info()
    built = facts.get("torch_built", "another torch or Python")
    return (
        f"{name} was built for torch {built} (Python {facts.get('python', 'unknown')}) but torch "
        f"{torch.__version__} is running ({error}); reinstall the matching wheel, or {_BUILD}"
    )


def _load_library(name: str) -> str:
    """Loads one library; returns an empty string or why it could not."""
    path = _PACKAGE / name
    if not path.exists():
        return _missing(name)
    target = re.findall(r"\d+", build_info().get("torch_target", "2.11"))
    if _torch_release() < (int(target[0]), int(target[1])):
        return _unfit(name, f"it needs {'.'.join(target)} or later")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return _unfit(name, str(error).splitlines()[0])
    return ""


def _load() -> Extension:
    if os.environ.get("M2MKD_NO_EXTENSION") == "1":
        reason = "M2MKD_NO_EXTENSION=1 is set; unset it"
        extension = Extension(cpu=False, cuda=False, reason=reason)
    else:
        reason = _load_library("_ops_cpu.so")
        extension = Extension(cpu=not reason, cuda=False, reason=reason)
        if extension.cpu and torch.version.cuda is not None:
            cuda_reason = _load_library(CUDA_LIBRARY.name)
            # Nobody misses CUDA kernels on a machine without a GPU.
            shown = cuda_reason if torch.cuda.is_available() else ""
            extension = Extension(cpu=True, cuda=not cuda_reason, reason=shown)
    if extension.reason:
        slow = "CUDA tensors run" if extension.cpu else "every op runs"
        warnings.warn(
            f"{slow} on slow PyTorch references: {extension.reason}", ExtensionWarning, stacklevel=2
        )
    return extension


EXTENSION = _load()


def status() -> dict[str, Any]:
    """What is compiled and loaded; costs nothing worth mentioning.

    Returns:
        kernels: devices ("cpu", "cuda") by op name, for the ops that have compiled kernels;
        build: facts from `m2mkd._C`, empty where it was not built for this Python;
        reason: why something is not loaded and what to do, or an empty string.
    """
    found: dict[str, list[str]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("m2mkd::"):
            found[schema.name.removeprefix("m2mkd::")] = [
                key.lower()
                for key in ("CPU", "CUDA")
                if torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, key)
            ]
    return {"kernels": found, "build": build_info(), "reason": EXTENSION.reason}
