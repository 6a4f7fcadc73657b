"""SLURM jobs of a run: what is asked for, what waits for what, and what a job does out of time."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from tiny import VALUES, tiny_recipe

from m2mkd.cli.main import main
from m2mkd.errors import ConfigError
from m2mkd.train import launch
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run

pytest.importorskip("submitit")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def scripts(recipe: Path, *options: str) -> dict[str, str]:
    arguments = ["launch", str(recipe), "--slurm", "--dry-run", *options]
    result = CliRunner().invoke(main, [*arguments, "--out", str(recipe.parent / "run")])
    assert result.exit_code == 0, result.output
    parts = re.split(r"^# (\w+)\n#!/bin/bash$", result.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_a_dry_run_shows_a_chain_of_jobs_and_writes_nothing(recipe: Path) -> None:
    shown = scripts(recipe, "--partition", "gpu", "--gpus", "4", "--setup", "module load cuda")
    waits = {
        stage: re.findall(r"<job id of (\w+)>", script.partition("# command")[0])
        for stage, script in shown.items()
    }
    assert waits == {
        "meta": [],
        "teacher": ["meta"],
        "distill": ["teacher"],
        "baselines": ["teacher"],
        "end_to_end": ["distill"],
        "evaluate": ["end_to_end", "baselines"],
    }
    for script in shown.values():
        for line in ("partition=gpu", "requeue", "signal=USR1@120", "open-mode=append"):
            assert f"#SBATCH --{line}\n" in script
        assert "\nmodule load cuda\n" in script and "--kill-on-bad-exit=1" in script
    assert not (recipe.parent / "run").exists()


def test_pairs_are_an_array_of_single_processes_with_a_throttle(recipe: Path) -> None:
    shown = scripts(recipe, "--gpus", "4", "--nodes", "2", "--at-once", "1")
    assert "#SBATCH --array=0-1%1\n" in shown["distill"]
    assert all("--array" not in script for stage, script in shown.items() if stage != "distill")
    tasks = {stage: re.search(r"ntasks-per-node=(\d+)", s)[1] for stage, s in shown.items()}
    assert tasks["distill"] == tasks["evaluate"] == "1"
    assert tasks["meta"] == tasks["teacher"] == tasks["end_to_end"] == "4"
    assert "#SBATCH --nodes=2\n" in shown["meta"] and "#SBATCH --nodes=1\n" in shown["distill"]


def test_a_machine_without_slurm_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run(tiny_recipe(), tmp_path / "run", Reporter(quiet=True))
    with pytest.raises(ConfigError, match="no srun on this machine"):
        launch.launch(run, launch.Resources())


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, ["requeue 77"]), (signal.SIGTERM, [])]
)
def test_a_job_out_of_time_saves_and_queues_itself_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, requeued: list[str]
) -> None:
    out, calls = tmp_path / "run", tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    original = Reporter.step

    def warned(self: Reporter, done: int, **numbers: float) -> None:
        original(self, done, **numbers)
        if done == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "step", warned)
    job = launch.StageJob(str(recipe), str(out), "meta")
    job()
    assert (out / "meta" / "last").read_text() == "step_000003"
    assert (calls.read_text().splitlines() if calls.exists() else []) == requeued
    monkeypatch.setattr(Reporter, "step", original)
    job()
    assert (out / "meta" / "DONE").is_file()


def test_experts_that_the_jobs_cannot_share_are_named_before_anything_is_queued(
    tmp_path: Path,
) -> None:
    run = Run(tiny_recipe(parallel="experts"), tmp_path, Reporter(quiet=True))
    shown: list[str] = []
    with pytest.raises(ConfigError, match="4 processes cannot share num_experts 3"):
        launch.launch(run, launch.Resources(nodes=2, gpus=2), shown.append)
    assert shown == []
    launch.launch(run, launch.Resources(nodes=1, gpus=3), shown.append)
    assert len(shown) == 6
