"""What pyproject.toml cannot say: the folder map, and the C++/CUDA extension.

Switches (environment variables):
    M2MKD_CUDA=0|1|auto     build the CUDA library: never, always, or when nvcc and a CUDA torch
                            are there (auto, the default)
    M2MKD_NO_EXTENSION=1    build nothing; every op runs on its PyTorch reference
    TORCH_CUDA_ARCH_LIST    GPU architectures; the default suits wheels
    MAX_JOBS                parallel compilations; the default fits cores and free memory
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
FOLDERS = {"m2mkd": "m2mkd", "m2mkd.export": "export", "m2mkd.cli": "cli"}
# The oldest torch whose stable C++ interface the kernels use: one build serves it and later ones.
TARGET_TORCH = (2, 11)
# Architecture, and the first CUDA release whose nvcc knows it.
WHEEL_ARCHS = {"8.0": 0.0, "8.6": 0.0, "8.9": 11.8, "9.0": 11.8, "10.0": 12.8, "12.0+PTX": 12.8}
TARGET = f"-DTORCH_TARGET_VERSION=0x{TARGET_TORCH[0]:02x}{TARGET_TORCH[1]:02x}000000000000"
FLAGS = [
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
MINIMUM_GCC = 11
GIB_PER_JOB = 2


def packages() -> list[str]:
    """Names of all packages; the links m2mkd/export and m2mkd/cli are for tools and left out."""
    names = set(FOLDERS)
    for name, folder in FOLDERS.items():
        skip = ["export", "export.*", "cli", "cli.*"] if name == "m2mkd" else []
        names |= {f"{name}.{sub}" for sub in find_packages(folder, exclude=skip)}
    return sorted(names)


def stop(message: str) -> None:
    """Ends the build with one line, without a traceback."""
    sys.exit(f"m2mkd: {message}")


def check_compiler() -> str:
    """Returns the compiler's name and version; ends the build where it cannot do C++20."""
    name = os.environ.get("CXX", "c++")
    command = name.split()
    if shutil.which(command[-1] if command[0] == "ccache" else command[0]) is None:
        stop(
            f"no C++ compiler: {name!r} was not found; install g++ {MINIMUM_GCC} or newer, or set "
            "CXX, or set M2MKD_NO_EXTENSION=1 to install without the kernels"
        )
    version = _output([*command, "--version"]).partition("\n")[0] or name
    major = re.search(r"__GNUC__ (\d+)", _output([*command, "-E", "-dM", "-x", "c++", os.devnull]))
    if "clang" not in version and major and int(major[1]) < MINIMUM_GCC:
        stop(f"{version} is too old; the kernels are C++20: set CXX to g++ {MINIMUM_GCC} or newer")
    return version


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def choose_jobs() -> None:
    """Sets MAX_JOBS from cores and free memory unless the user did, and says so."""
    if "MAX_JOBS" in os.environ:
        return
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    free = re.search(r"MemAvailable:\s+(\d+) kB", text)
    jobs = max(1, min(cores, int(free[1]) // (GIB_PER_JOB << 20) if free else cores))
    os.environ["MAX_JOBS"] = str(jobs)
    print(f"m2mkd: MAX_JOBS={jobs} for {cores} cores, {GIB_PER_JOB} GiB a job; set it to change it")


def set_cuda_home() -> None:
    """Points CUDA_HOME at a toolkit with headers: nvcc on the PATH may be a script elsewhere."""
    nvcc = shutil.which("nvcc")
    if "CUDA_HOME" in os.environ or nvcc is None:
        return
    for home in (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(home)
            return


def nvcc_version(cuda_home: str | None) -> float | None:
    """Release of nvcc such as 13.0, or None where there is none."""
    nvcc = Path(cuda_home, "bin", "nvcc") if cuda_home else None
    if nvcc is None or not nvcc.exists():
        return None
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", out)
    return float(found[1]) if found else None


def wants_cuda(nvcc: float | None, torch_cuda: str | None) -> bool:
    """Whether to build the CUDA library, by M2MKD_CUDA and what is there."""
    choice = os.environ.get("M2MKD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        stop(f"M2MKD_CUDA={choice!r}; use 0, 1 or auto")
    if choice == "0":
        return False
    missing = "nvcc (set CUDA_HOME)" if nvcc is None else "a torch built for CUDA"
    if nvcc is None or torch_cuda is None:
        if choice == "1":
            stop(f"M2MKD_CUDA=1 but {missing} was not found")
        print(f"m2mkd: no CUDA library, for want of {missing}")
        return False
    if int(nvcc) != int(float(torch_cuda)):
        apart = f"nvcc is of CUDA {nvcc}, but torch {torch_cuda}; their major versions must agree"
        if choice == "1":
            stop(f"M2MKD_CUDA=1, and {apart}")
        print(f"m2mkd: no CUDA library: {apart}")
        return False
    return True


def write_facts(folder: Path, facts: dict[str, str]) -> None:
    """Writes what m2mkd._C reports about the build."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f'    {{"{key}", R"({value})"}},\n' for key, value in facts.items())
    text = f"constexpr const char* kBuildFacts[][2] = {{\n{rows}}};\n"
    path = folder / "build_facts.h"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def package_version() -> str:
    """The version in m2mkd/__init__.py, read without importing the package."""
    text = (ROOT / "m2mkd" / "__init__.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def sources(*patterns: str) -> list[str]:
    """Sources under csrc/ that match, relative to the root, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def cpu_module(cpp_extension: Any) -> Extension:
    """The schemas and CPU kernels."""
    return cpp_extension.CppExtension(
        "m2mkd._ops_cpu",
        sources("csrc/library.cpp", "csrc/cpu/*.cpp"),
        extra_compile_args=[*FLAGS, TARGET],
        depends=sources("csrc/*.h", "csrc/cpu/*.h"),
        py_limited_api=True,
    )


def cuda_module(cpp_extension: Any, nvcc: float) -> Extension:
    """The CUDA kernels, for TORCH_CUDA_ARCH_LIST or what a wheel should serve."""
    archs = ";".join(arch for arch, since in WHEEL_ARCHS.items() if nvcc >= since)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)
    return cpp_extension.CUDAExtension(
        "m2mkd._ops_cuda",
        sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
        extra_compile_args={
            "cxx": [*FLAGS, TARGET, "-DUSE_CUDA"],
            "nvcc": ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"],
        },
        depends=sources("csrc/*.h", "csrc/cuda/*.h"),
        py_limited_api=True,
    )


def facts_module(include: str) -> Extension:
    """m2mkd._C, which needs pybind11 and nothing of torch."""
    return Extension(
        "m2mkd._C",
        sources("csrc/python/*.cpp"),
        include_dirs=[include, str(ROOT / "build" / "facts")],
        extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", "-g0"],
        depends=["build/facts/build_facts.h"],
        language="c++",
    )


def extensions() -> dict[str, Any]:
    """The ext_modules and cmdclass arguments of setup()."""
    if os.environ.get("M2MKD_NO_EXTENSION") == "1":
        print("m2mkd: M2MKD_NO_EXTENSION=1, so the kernels are not built")
        return {}
    set_cuda_home()
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(f"{error}; install torch and pybind11 first and use pip install --no-build-isolation")
    compiler = check_compiler()
    nvcc = nvcc_version(cpp_extension.CUDA_HOME)
    modules = [cpu_module(cpp_extension)]
    if wants_cuda(nvcc, torch.version.cuda) and nvcc is not None:
        modules.append(cuda_module(cpp_extension, nvcc))
    choose_jobs()
    has_cuda = len(modules) > 1
    facts = {
        "version": package_version(),
        "compiler": compiler,
        "flags": " ".join([*FLAGS, TARGET]),
        "torch_built": torch.__version__,
        "torch_target": ".".join(map(str, TARGET_TORCH)),
        "python": sys.version.split()[0],
        "cuda": str(nvcc) if has_cuda else "none",
        "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if has_cuda else "none",
    }
    write_facts(ROOT / "build" / "facts", facts)
    modules.append(facts_module(pybind11.get_include()))

    class Build(cpp_extension.BuildExtension):
        """Names the operator libraries without a Python tag: they contain no Python."""

        def get_ext_filename(self, ext_name: str) -> str:
            if ext_name.rpartition(".")[2].startswith("_ops_"):
                return os.path.join(*ext_name.split(".")) + ".so"
            return str(super().get_ext_filename(ext_name))

    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


def wants_extension(commands: Iterable[str]) -> bool:
    """Whether any command compiles or installs; metadata and source archives need no compiler."""
    return not set(commands) <= {"egg_info", "dist_info", "sdist", "clean", "--help", "--version"}


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    extra = extensions() if wants_extension(arguments[:1] or ["--help"]) else {}
    setup(packages=packages(), package_dir=FOLDERS, **extra)
