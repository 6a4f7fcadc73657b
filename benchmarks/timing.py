"""Clocks, rounds and ratios shared by the kernel benchmarks."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Clock = Callable[[], float]


def choose_clock(device: str, kind: str) -> Clock:
    """Seconds by the wall, or of this process's own CPU time; on a GPU after it has finished.

    Args:
        device: cpu or cuda.
        kind: wall or cpu.
    """
    if device == "cuda":

        def finished() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return finished
    return time.process_time if kind == "cpu" else time.perf_counter


def measure(
    forms: Mapping[str, Callable[[], object]], base: str, rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """Runs every form once in every round, after a first run of each that does not count.

    Returns:
        By form: ms, the median; ratio, ratio_low and ratio_high, median and quartiles of its time
        divided by that of `base` in the same round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            start = clock()
            form()
            seconds[name].append(clock() - start)
    results = {}
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        results[name] = {
            "ms": 1e3 * statistics.median(times),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }
    return results


def reset_resident_peak() -> float:
    """Forgets this process's peak so far; returns what it holds now, MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> float:
    """The most memory this process has held, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def copy_bandwidth(device: str, clock: Clock) -> float:
    """Bytes a second, read and written together, of a copy of 256 MiB; the best of ten."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        start = clock()
        target.copy_(source)
        best = min(best, clock() - start)
    return 2 * source.numel() * source.element_size() / best


def machine(device: str) -> str:
    """What the figures hold for."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    capability = torch.backends.cpu.get_cpu_capability() if device == "cpu" else ""
    return " ".join(f"torch {torch.__version__}, {name} {capability}".split())
