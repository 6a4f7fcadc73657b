"""The SLURM script of docs/cluster.md, run against stand-ins for sbatch, srun and scontrol."""

import os
import re
import subprocess
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "cluster.md"
STAND_INS = {
    # Numbers the jobs, keeps their options, and says the number as --parsable does.
    "sbatch": 'echo "$@" >> "$LOG"; wc -l < "$LOG"',
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
    "m2mkd": 'echo "m2mkd $*" >> "$LOG"; [ -z "$FINISHES" ] || touch "$FINISHES"; exit ${CODE:-0}',
    "scontrol": '[ "$1" = show ] && echo node1 || echo "scontrol $*" >> "$LOG"',
    "module": "true",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "LOG": str(tmp_path / "log"), "FINISHES": ""}


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A run folder whose jobs the guide's script has submitted."""
    [script] = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "submit.sh").write_text(script)
    out = tmp_path / "run"
    command = ["bash", str(tmp_path / "submit.sh"), "my.yaml", str(out), "4"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return out


def test_the_script_submits_a_chain_of_jobs(run: Path, environment: dict[str, str]) -> None:
    jobs = Path(environment["LOG"]).read_text().splitlines()
    assert [re.search(r"job-name=(\w+)", job)[1] for job in jobs] == [
        *("meta", "teacher", "distill", "end_to_end", "evaluate")
    ]
    waits = [re.findall(r"afterok:(\d+)", job) for job in jobs]
    assert waits == [[], ["1"], ["2"], ["3"], ["4"]]
    assert "--array=0-3%4" in jobs[2] and "--ntasks-per-node=1" in jobs[2]
    assert "--ntasks-per-node=4 --gpus-per-node=4" in jobs[0]


@pytest.mark.parametrize(
    ("finishes", "code", "requeued"), [(True, 0, False), (False, 0, True), (False, 1, False)]
)
def test_a_task_is_queued_again_when_it_saved_but_not_when_it_failed(
    run: Path, environment: dict[str, str], finishes: bool, code: int, requeued: bool
) -> None:
    (run / "distill" / "pair-02").mkdir(parents=True)
    slurm = {
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "1",
        "CODE": str(code),
        "FINISHES": str(run / "distill" / "pair-02" / "DONE") if finishes else "",
    }
    script = ["bash", str(run / "slurm" / "stage.sbatch"), "my.yaml", str(run), "distill"]
    result = subprocess.run(script, env={**environment, **slurm}, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    log = Path(environment["LOG"]).read_text()
    assert f"m2mkd train my.yaml --out {run} --stage distill --pair 2" in log
    assert ("scontrol requeue 77" in log) == requeued
