"""Builds the CUDA kernels for the CPU, on csrc/emulator, and runs ops on them.

    import emulation

    with emulation.kernels(seed=3):
        ops.moe_gather(x, plan)  # tensors of the CPU, CUDA kernels

What a kernel does wrong raises a RuntimeError with detector, kernel, block, threads and lines.
`M2MKD_EMULATOR_SOURCES` names another folder than csrc/cuda, such as a changed copy of it;
`M2MKD_EMULATOR_SEED` sets the seed of all schedules, which is random otherwise.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = Path(os.environ.get("M2MKD_EMULATOR_SOURCES", CSRC / "cuda")).resolve()
BUILD = ROOT / "build" / "emulator"
SEED = int(os.environ.get("M2MKD_EMULATOR_SEED") or secrets.randbits(32))
CXX = shlex.split(os.environ.get("CXX", "c++"))

COMMON = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DM2MKD_EMULATOR",
    "-DM2MKD_PLATFORM=<emulator/platform.h>",
    f"-I{CSRC}",
]
# The compiler then calls the emulator at every access. Lines are those of the source at -O1, and
# binutils reads DWARF 4 better than 5. Integers wrap, as a card's do: an offset that does not fit
# its type is out of bounds, and not whatever the optimiser makes of it.
KERNEL = [*COMMON, "-O1", "-fwrapv", "-gdwarf-4", "-g1", "-fsanitize=thread,alignment", "-x", "c++"]
RUNTIME = [*COMMON, "-O2"]
WRAPPER = [
    *COMMON,
    "-O1",
    "-DM2MKD_NAMESPACE=m2mkd_emulated",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-isystem{Path(torch.__file__).parent / 'include'}",
]


def runtime_sources() -> list[Path]:
    """The emulator itself."""
    return sorted((CSRC / "emulator").glob("*.cpp"))


@functools.cache
def _headers(cuda: Path) -> bytes:
    """A digest of all headers and the compiler."""
    version = subprocess.run([*CXX, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version)
    for folder in (CSRC, CSRC / "emulator", cuda, Path(__file__).parent):
        for path in sorted(folder.glob("*.h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _object(cuda: Path, source: Path, flags: list[str]) -> Path:
    """Compiles one source, unless the same content was compiled before."""
    content = _headers(cuda) + source.read_bytes() + "\0".join(flags).encode()
    target = BUILD / f"{source.name}.{hashlib.sha256(content).hexdigest()[:20]}.o"
    if not target.exists():
        part = target.with_suffix(".part")
        # The second folder is for what a changed copy includes from its neighbours.
        include = [f"-I{cuda}", f"-I{CSRC / 'cuda'}"]
        subprocess.run([*CXX, *flags, *include, "-c", str(source), "-o", str(part)], check=True)
        part.rename(target)
    return target


def _link(name: str, cuda: Path, sources: dict[Path, list[str]], flags: list[str]) -> Path:
    """Compiles and links; processes that build at the same time wait for each other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiled = pool.map(functools.partial(_object, cuda), sources, sources.values())
        objects = [str(path) for path in compiled]
        key = hashlib.sha256("\0".join([*objects, *flags]).encode()).hexdigest()[:20]
        target = BUILD / f"{name}.{key}"
        if not target.exists():
            part = target.with_suffix(".part")
            subprocess.run([*CXX, *objects, *flags, "-o", str(part)], check=True)
            part.rename(target)
    return target


@functools.cache
def detectors() -> Path:
    """The program that proves the detectors, detectors.cu."""
    sources = {Path(__file__).parent / "detectors.cu": KERNEL}
    return _link("detectors", CUDA, sources | {path: RUNTIME for path in runtime_sources()}, [])


def launchers(cuda: Path = CUDA) -> Path:
    """The program that compares every launcher of the kernels in `cuda` with plain loops."""
    sources = {Path(__file__).parent / "launchers.cu": KERNEL}
    sources |= {path: KERNEL for path in sorted(cuda.glob("*.cu"))}
    return _link("launchers", cuda, sources | {path: RUNTIME for path in runtime_sources()}, [])


@functools.cache
def library() -> Path:
    """The library of all ops, registered as m2mkd_emulated for tensors of the CPU; loaded."""
    sources = {path: KERNEL for path in sorted(CUDA.glob("*.cu"))}
    sources |= {path: WRAPPER for path in [CSRC / "library.cpp", *sorted(CUDA.glob("*.cpp"))]}
    sources |= {path: RUNTIME for path in runtime_sources()}
    folder = Path(torch.__file__).parent / "lib"
    path = _link("ops.so", CUDA, sources, ["-shared", f"-L{folder}", "-ltorch_cpu"])
    torch.ops.load_library(path)
    return path


def set_seed(seed: int) -> None:
    """Chooses the schedules of the launches to come."""
    ctypes.CDLL(str(library())).m2mkd_emulator_set_seed(ctypes.c_uint64(seed))


@contextmanager
def kernels(seed: int = SEED) -> Iterator[None]:
    """Runs m2mkd's ops on emulated CUDA kernels instead of the CPU's.

    Args:
        seed: Of the schedules; the same for all tests of a run unless given.
    """
    set_seed(seed)
    override = torch.library.Library("m2mkd", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "m2mkd_emulated" and torch._C._dispatch_has_kernel_for_dispatch_key(
            schema.name, "CPU"
        ):
            op = getattr(torch.ops.m2mkd_emulated, name).default
            kernel = functools.partial(
                op.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            )
            override.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()
