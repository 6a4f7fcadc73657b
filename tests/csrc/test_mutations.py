"""Kernels of the project with a bug put in are reported; as they are, they agree with loops."""

import shutil
import subprocess
from pathlib import Path

import emulation
import pytest

NOTHING = ""


def run(cuda: Path) -> subprocess.CompletedProcess[str]:
    """Runs all launchers of the kernels in a folder."""
    program = str(emulation.launchers(cuda))
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)


def test_every_launcher_agrees_with_plain_loops() -> None:
    done = run(emulation.CUDA)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "before", "after", "reports"),
    [
        pytest.param(
            "moe_plan.cu",
            "    counts[expert] = lower + 1;\n  }\n  __syncthreads();",
            "    counts[expert] = lower + 1;\n  }",
            ("race", "uninitialised"),
            id="a barrier removed",
        ),
        pytest.param(
            "moe_plan.cu",
            "    total += scratch[w];\n  }\n  __syncthreads();",
            "    total += scratch[w];\n  }",
            ("race",),
            id="the barrier before the next round removed",
        ),
        pytest.param(
            "moe_plan.cu",
            "    counts[e] = 0;\n  }\n  __syncwarp(kFullMask);",
            "    counts[e] = 0;\n  }",
            ("race",),
            id="a syncwarp removed",
        ),
        pytest.param(
            "moe_plan.cu",
            "__shfl_up_sync(kFullMask, x, step)",
            "__shfl_up_sync(0xffffu, x, step)",
            ("missing lane",),
            id="a mask too small",
        ),
        pytest.param(
            "moe_plan.cu",
            "if (i < rows && i >= offsets[experts])",
            "if (i <= rows && i >= offsets[experts])",
            ("out of bounds",),
            id="a bound off by one",
        ),
        pytest.param(
            "moe_rows.cu",
            "reinterpret_cast<const P*>(x) + token * packs",
            "reinterpret_cast<const P*>(x) + int(token) * packs",
            ("far from the start, gather: emulator: ",),
            id="an offset in 32 bits",
        ),
        pytest.param(
            "moe_plan.cu",
            "counts[at] = earlier + sum - count;",
            "counts[at] = earlier + sum;",
            ("out of bounds", "other integers", "output not written"),
            id="an inclusive scan in place of an exclusive one",
        ),
        pytest.param(
            "circuit_receivers.cu",
            "      __syncthreads();\n",
            NOTHING,
            ("race",),
            id="the barrier between two heads removed",
        ),
        pytest.param(
            "moe_gate.cu",
            "  __syncwarp(kFullMask);\n",
            NOTHING,
            ("race", "uninitialised"),
            id="a syncwarp before a read of global memory removed",
        ),
    ],
)
def test_a_bug_in_a_kernel_is_reported(
    file: str, before: str, after: str, reports: tuple[str, ...], tmp_path: Path
) -> None:
    cuda = tmp_path / "cuda"
    shutil.copytree(emulation.CUDA, cuda)
    text = (cuda / file).read_text()
    assert before in text, "the kernel has changed; change this test with it"
    (cuda / file).write_text(text.replace(before, after, 1))
    done = run(cuda)
    assert done.returncode == 1
    assert any(report in done.stdout.splitlines()[0] for report in reports), done.stdout
    assert f" {file}:" in done.stdout or "other integers" in done.stdout.splitlines()[0]
