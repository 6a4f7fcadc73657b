"""Each of the emulator's detectors finds its planted bug, and nothing in the mended kernel."""

import subprocess

import emulation
import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program of broken kernels."""
    command = [str(emulation.detectors()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_broken_kernel_is_reported_with_its_lines_and_every_mended_one_is_clean() -> None:
    done = run()
    assert done.returncode == 0, done.stdout
    names = run("--list").stdout.split()
    found = {line.partition(":")[0] for line in done.stdout.splitlines() if ": emulator: " in line}
    # All but the kernels that must not alarm.
    assert len(names) > 40
    assert len(found) > 30 and found < set(names)


def test_a_report_says_who_did_what_where_and_how_to_repeat_it() -> None:
    report = run("missing_barrier").stdout
    for part in (
        "emulator: race",
        "kernel missing_barrier, block (0,0,0)",
        "of shared array values, 256 bytes in all",
        "before\n    at broken_kernels.h:",
        "repeat with M2MKD_EMULATOR_SEED=1",
    ):
        assert part in report


@pytest.mark.parametrize("name", ["no such kernel", ""])
def test_the_program_refuses_a_name_it_does_not_know(name: str) -> None:
    assert run(name).returncode == 1
