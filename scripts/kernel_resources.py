"""What every CUDA kernel takes of a multiprocessor, without a GPU: from ptxas and the machine code.

    python scripts/kernel_resources.py --check     # compare with the committed table (CI)
    python scripts/kernel_resources.py --write     # make the table anew

Compiles csrc/cuda/*.cu for four architectures and reads registers, shared memory and spills of
every instantiation. `--check` fails on local memory of any kind, on registers well over the table,
on kernels the table does not name, on atomics, and where loads of sixteen bytes are missing. The
table is csrc/kernel_resources.json; csrc/KERNELS.md shows its worst rows. Needs nvcc; the machine
code is read by cuobjdump, which comes with CUDA or with triton.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = ROOT / "csrc" / "kernel_resources.json"
PAGE = ROOT / "csrc" / "KERNELS.md"
CUBINS = ROOT / "build" / "cubin"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v"]
MARK = "<!-- kernel_resources.py writes from here to the end -->"
# Registers may rise by this much over the table, whichever is more.
RISE, RISE_SHARE = 8, 0.1
WARP = 32
# Registers are handed to warps in units of so many, and each block loses 1 KB of shared memory.
REGISTER_UNIT, RESERVED_SHARED = 256, 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: CUDA C++ programming guide, technical specifications."""

    warps: int
    blocks: int
    registers: int
    shared: int  # bytes; a block may have RESERVED_SHARED less


ARCHS = {
    "8.0": Limits(64, 32, 65536, 164 << 10),
    "9.0": Limits(64, 32, 65536, 228 << 10),
    "10.0": Limits(64, 32, 65536, 228 << 10),
    "12.0": Limits(48, 24, 65536, 100 << 10),
}

# File and constant that hold each kernel's block size; staged ones have two.
THREADS = {
    "topk_gate": ("moe_gate.cu", "kThreads"),
    "topk_gate_backward": ("moe_gate.cu", "kThreads"),
    "count": ("launchers.h", "kPlanBlock"),
    "scan_blocks": ("launchers.h", "kPlanBlock"),
    "scan_experts": ("launchers.h", "kPlanBlock"),
    "place": ("launchers.h", "kPlanBlock"),
    "gather": ("moe_rows.cu", "kThreads"),
    "sum_rows": ("moe_rows.cu", "kThreads"),
    "combine_backward": ("moe_rows.cu", "kThreads"),
    "invert_rows": ("moe_rows.cu", "kThreads"),
    "activate": ("moe_activation.cu", "kThreads"),
    "activate_backward": ("moe_activation.cu", "kThreads"),
    "sum_chunks": ("moe_columns.cu", "kThreads"),
    "add_chunks": ("moe_columns.cu", "kThreads"),
    "circuit_forward": ("circuit_forward.cu", "kStagedThreads"),
    "circuit_receivers": ("circuit_receivers.cu", "kStagedThreads"),
    "circuit_senders": ("circuit_senders.cu", "kStagedThreads"),
    "circuit_forward direct": ("circuit_launch.h", "kDirectThreads"),
    "circuit_receivers direct": ("circuit_launch.h", "kDirectThreads"),
    "circuit_senders direct": ("circuit_launch.h", "kDirectThreads"),
    "sum_parts": ("circuit_receivers.cu", "kSumThreads"),
}
# Of launchers.h, in order.
ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "relu", "silu")
# Kernels that move rows in packs, or would if the pack has more than one element.
PACKED = {"gather", "sum_rows", "combine_backward", "activate", "activate_backward", "sum_chunks"}


@dataclass(frozen=True)
class Resources:
    """Of one instantiation on one architecture.

    Attributes:
        registers: Per thread.
        shared: Static shared memory of a block in bytes.
        local: Bytes of stack, spill stores and spill loads together; 0 is the only good value.
        warps: Most resident warps of a multiprocessor by block size, registers and static shared
            memory, and for staged circuit kernels by the tables of 320 rows in their widest heads.
    """

    registers: int
    shared: int
    local: int
    warps: int


Table = dict[str, dict[str, Resources]]  # by kernel, then architecture


def tool(name: str) -> str | None:
    """Path of a CUDA program: on the PATH, beside nvcc, or in triton's wheel."""
    found = shutil.which(name)
    if found or name == "nvcc":
        return found
    places = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(place / name) for place in places if (place / name).exists()), None)


def output(command: Sequence[str], text: str | None = None) -> str:
    """Standard output of a program that succeeds; its last words otherwise."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def nvcc_release() -> str:
    """Such as 13.0."""
    found = re.search(r"release (\d+\.\d+)", output([tool("nvcc") or "nvcc", "--version"]))
    return found[1] if found else "unknown"


def compile_all(archs: Iterable[str], jobs: int) -> dict[str, list[Path]]:
    """Cubins of all sources by architecture; what has not changed is not compiled again."""
    key = hashlib.sha256(f"{nvcc_release()} {FLAGS}".encode())
    work = []
    for arch in archs:
        for source in sorted(SOURCES.glob("*.cu")):
            mine = key.copy()
            for file in [source, *included(source)]:
                mine.update(file.read_bytes())
            folder = CUBINS / arch.replace(".", "")
            work.append((arch, source, folder / f"{source.stem}-{mine.hexdigest()[:12]}.cubin"))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: _compile(*job), work))
    return {arch: [cubin for of, _, cubin in work if of == arch] for arch in archs}


def included(source: Path) -> list[Path]:
    """The project's headers that a source includes, and what those include."""
    found: dict[Path, None] = {}
    for name in re.findall(r'#include "(\w+\.h)"', source.read_text()):
        header = SOURCES / name
        found |= dict.fromkeys([header, *included(header)])
    return list(found)


def _compile(arch: str, source: Path, cubin: Path) -> None:
    log = cubin.with_suffix(".log")
    if log.exists():
        return
    cubin.parent.mkdir(parents=True, exist_ok=True)
    for old in cubin.parent.glob(f"{source.stem}-*"):
        old.unlink()
    command = [tool("nvcc") or "nvcc", *FLAGS, f"-arch=sm_{arch.replace('.', '')}"]
    command += [str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{source.name} does not compile for {arch}:\n{done.stderr[-2000:]}")
    log.write_text(done.stdout + done.stderr)


def short_name(demangled: str) -> str:
    """Such as `circuit_forward bf16 8x8x1 staged`: the type, then the numbers of a Layout."""
    found = re.search(r"(\w+)_kernel(?:<(.*)>)?\(", demangled)
    if found is None:
        sys.exit(f"no kernel's name: {demangled}")
    arguments = found[2] or ""
    for long, short in (
        ("__nv_bfloat16", "bf16"),
        ("__half", "f16"),
        ("double", "f64"),
        ("float", "f32"),
    ):
        arguments = arguments.replace(long, short)
    layout = re.search(r"Layout<(\w+), (\d+), (\d+), (\d+), (\w+)>", arguments)
    if layout:
        where = "staged" if layout[5] == "true" else "direct"
        arguments = f"{layout[1]} {layout[2]}x{layout[3]}x{layout[4]} {where}"
    arguments = re.sub(
        r"\(m2mkd::cuda::Activation\)(\d)", lambda m: ACTIVATIONS[int(m[1])], arguments
    )
    return f"{found[1]} {arguments.replace(',', '')}".strip()


def demangle(names: list[str]) -> list[str]:
    """Short names of mangled kernels."""
    return [short_name(line) for line in output(["c++filt"], "\n".join(names)).splitlines()]


def read_log(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, static shared memory and local memory by mangled name, from `ptxas -v`."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if local is None or registers is None:
            sys.exit(f"ptxas says nothing of {name}")
        total = sum(int(number) for number in local.groups())
        found[name] = (int(registers[1]), int(shared[1]) if shared else 0, total)
    return found


def block_threads(kernel: str) -> int:
    """Threads of a block, from the constant in the source."""
    words = kernel.split()
    name = f"{words[0]} direct" if words[-1] == "direct" else words[0]
    file, constant = THREADS[name]
    found = re.search(rf"constexpr int {constant} = (\d+);", (SOURCES / file).read_text())
    if found is None:
        sys.exit(f"{file} has no {constant}")
    return int(found[1])


def dynamic_shared(kernel: str) -> int:
    """Bytes of two tables of 320 rows for a staged circuit kernel, 0 for others."""
    layout = re.search(r" (f32|f16|bf16) (\d+)x(\d+)x(\d+) staged", kernel)
    if layout is None:
        return 0
    elements = int(layout[2]) * int(layout[3]) * int(layout[4])
    return 2 * 320 * elements * (4 if layout[1] == "f32" else 2)


def resident_warps(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """Most warps of one kernel on a multiprocessor; 0 where not even a block fits."""
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # Each of the four schedulers has its own registers.
    by_registers = limits.registers // 4 // per_warp * 4 // warps
    by_shared = limits.shared // (shared + RESERVED_SHARED)
    return min(limits.warps // warps, limits.blocks, by_registers, by_shared) * warps


def measure(cubins: dict[str, list[Path]]) -> Table:
    """Resources of every kernel in these cubins."""
    table: Table = {}
    for arch, paths in cubins.items():
        for path in paths:
            logged = read_log(path.with_suffix(".log").read_text())
            for kernel, (registers, shared, local) in zip(
                demangle(list(logged)), logged.values(), strict=True
            ):
                total = shared + dynamic_shared(kernel)
                warps = resident_warps(ARCHS[arch], block_threads(kernel), registers, total)
                found = Resources(registers, shared, local, warps)
                table.setdefault(kernel, {})[arch] = found
    return dict(sorted(table.items()))


def instructions(cubin: Path, dump: str) -> dict[str, set[str]]:
    """Names of the machine instructions of every kernel in a cubin."""
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in output([dump, "-sass", str(cubin)]).splitlines():
        if "Function : " in line:
            current = found.setdefault(line.partition("Function : ")[2].strip(), set())
        code = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)
        if code:
            current.add(code[1])
    return dict(zip(demangle(list(found)), found.values(), strict=True))


def faults_in_code(kernel: str, names: set[str]) -> list[str]:
    """What the machine code has that it must not have, or lacks."""
    faults = [
        f"{kernel}: {name}, an atomic"
        for name in sorted(names)
        if name.startswith(("ATOM", "RED.", "REDG", "REDS"))
    ]
    if names & {"LDL", "STL"} or any(name.startswith(("LDL.", "STL.")) for name in names):
        faults.append(f"{kernel}: local memory")
    words = kernel.split()
    wide = {name for name in names if name.endswith((".128", ".128.CONSTANT"))}
    if words[0].startswith("circuit_") and not words[2].startswith("1x"):
        needed = ["LDG.E.128", "STG.E.128"] + (["LDS.128"] if words[-1] == "staged" else [])
    elif words[0] in PACKED and words[-1] != "1":
        needed = ["LDG.E.128"] + (["STG.E.128"] if words[0] != "sum_chunks" else [])
    else:
        needed = []
    faults += [
        f"{kernel}: no {name}" for name in needed if not any(w.startswith(name) for w in wide)
    ]
    return faults


def check_code(cubins: dict[str, list[Path]]) -> list[str]:
    """Faults in the machine code of all kernels; nothing where there is no cuobjdump."""
    dump = tool("cuobjdump")
    if dump is None:
        print("cuobjdump was not found, so the machine code was not read", file=sys.stderr)
        return []
    return [
        f"{arch}: {fault}"
        for arch, paths in cubins.items()
        for path in paths
        for kernel, names in instructions(path, dump).items()
        for fault in faults_in_code(kernel, names)
    ]


def check_table(found: Table, committed: Table, same_compiler: bool) -> list[str]:
    """Local memory, and differences from the committed table that matter."""
    faults = [
        f"{arch}: {kernel} has {one.local} bytes of local memory"
        for kernel, by_arch in found.items()
        for arch, one in by_arch.items()
        if one.local
    ]
    missing = [f"{kernel} is not in the table; run --write" for kernel in found.keys() - committed]
    gone = [f"{kernel} is only in the table; run --write" for kernel in committed.keys() - found]
    faults += sorted(missing) + sorted(gone)
    if not same_compiler:
        return faults
    for kernel in found.keys() & committed.keys():
        for arch, one in found[kernel].items():
            before = committed[kernel][arch].registers
            if one.registers > before + max(RISE, int(before * RISE_SHARE)):
                faults.append(f"{arch}: {kernel} takes {one.registers} registers, was {before}")
    return faults


def read_table() -> tuple[str, Table]:
    """The nvcc release of the committed table, and the table."""
    stored = json.loads(TABLE.read_text())
    kernels = {
        kernel: {arch: Resources(*row) for arch, row in zip(ARCHS, rows, strict=True)}
        for kernel, rows in stored["kernels"].items()
    }
    return stored["nvcc"], kernels


def write_table(table: Table) -> None:
    """Writes the table, a kernel a line, and the tables of the page."""
    rows = ",\n".join(
        f"    {json.dumps(kernel)}: "
        + json.dumps([list(asdict(by_arch[arch]).values()) for arch in ARCHS])
        for kernel, by_arch in table.items()
    )
    TABLE.write_text(
        "{\n"
        f'  "nvcc": "{nvcc_release()}",\n'
        f'  "archs": {json.dumps(list(ARCHS))},\n'
        f'  "columns": {json.dumps(list(Resources.__dataclass_fields__))},\n'
        '  "kernels": {\n' + rows + "\n  }\n}\n"
    )
    before = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(before + MARK + "\n\n" + page_tables(table))


def page_tables(table: Table) -> str:
    """The worst instantiation of each kernel, for reading."""
    groups: dict[str, list[str]] = {}
    for kernel in table:
        words = kernel.split()
        name = f"{words[0]}, {words[-1]}" if words[-1] in ("staged", "direct") else words[0]
        name += ", f64" if "f64" in words else ""
        groups.setdefault(name, []).append(kernel)
    lines = [
        f"nvcc {nvcc_release()}. Registers a thread, most of all instantiations / resident warps a",
        "multiprocessor, fewest of all. Local memory: none in any.",
        "",
        "| kernel | forms | block | static shared | " + " | ".join(ARCHS) + " |",
        "|---|---|---|---|" + "---|" * len(ARCHS),
    ]
    for name, kernels in groups.items():
        cells = []
        for arch in ARCHS:
            some = [table[kernel][arch] for kernel in kernels]
            fewest = min((one.warps for one in some if one.warps), default=0)
            cells.append(f"{max(one.registers for one in some)} / {fewest}")
        shared = max(one.shared for kernel in kernels for one in table[kernel].values())
        lines.append(
            f"| {name} | {len(kernels)} | {block_threads(kernels[0])} | {shared} B | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--write", action="store_true", help="make the table anew")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this one")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    options = parser.parse_args()
    if tool("nvcc") is None:
        sys.exit("nvcc is not on the PATH")
    if options.write and options.arch:
        parser.error("--write makes the whole table; leave out --arch")
    cubins = compile_all(options.arch or list(ARCHS), options.jobs)
    table = measure(cubins)
    faults = check_code(cubins)
    if options.write:
        write_table(table)
    release, committed = read_table()
    faults += check_table(table, committed, release == nvcc_release())
    print(f"{len(table)} kernels for {', '.join(cubins)}: {len(faults)} faults")
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
