"""Several jobs and one run folder: who may write, who waits, and what is left by the dead."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from tiny import VALUES, metrics, tiny_recipe

from m2mkd.errors import BusyError, CheckpointError
from m2mkd.models.checkpoint import read_checkpoint
from m2mkd.train import claim, execute
from m2mkd.train.claim import Claim, check_free
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter
from m2mkd.train.stopping import Preempted, StopRequest, stopping_on_signals

quiet: list[str] = []


def hold(folder: Path, **changes: Any) -> dict[str, Any]:
    """Leaves a claim as another process would."""
    facts = {"id": "other", "host": "elsewhere", "pid": 1, "started": "1", "job": None, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RUNNING").write_text(json.dumps(facts))
    return facts


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_BEAT", 0.02), ("_EXPIRY", 0.5), ("_POLL", 0.01)):
        monkeypatch.setattr(claim, name, seconds)
    monkeypatch.setattr(execute, "_POLL", 0.05)


def test_a_claim_is_given_up_at_the_end_and_by_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Claim(tmp_path / "meta", quiet.append) as held:
            held.check()
            raise ZeroDivisionError
        assert os.listdir(tmp_path / "meta") == []


def test_a_living_process_of_this_machine_keeps_its_claim(tmp_path: Path) -> None:
    with Claim(tmp_path, quiet.append):
        with pytest.raises(BusyError, match=f"written by process {os.getpid()} on"):
            Claim(tmp_path, quiet.append)
        with pytest.raises(BusyError, match="let it finish"):
            check_free(tmp_path, quiet.append)


def test_a_dead_process_of_this_machine_loses_it_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    hold(tmp_path, host=socket.gethostname(), pid=child.pid, started="123", job="9")
    messages: list[str] = []
    with Claim(tmp_path, messages.append):
        assert len(messages) == 1 and "SLURM job 9 is gone; taking over" in messages[0]


def test_a_process_elsewhere_keeps_it_while_it_shows_signs_of_life(tmp_path: Path) -> None:
    hold(tmp_path)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            os.utime(tmp_path / "RUNNING")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(BusyError, match="process 1 on elsewhere"):
            Claim(tmp_path, quiet.append)
    finally:
        ended.set()
        thread.join()
    with Claim(tmp_path, quiet.append) as held:  # and loses it when they stop
        held.check()


def test_a_job_queued_again_takes_its_own_claim_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_EXPIRY", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    hold(tmp_path, job="77")
    with Claim(tmp_path, quiet.append):
        assert json.loads((tmp_path / "RUNNING").read_text())["job"] == "77"
        assert json.loads((tmp_path / "RUNNING").read_text())["id"] != "other"


def test_half_a_claim_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "RUNNING").write_text('{"id": "o')
    with Claim(tmp_path, quiet.append):
        assert json.loads((tmp_path / "RUNNING").read_text())["pid"] == os.getpid()


def test_an_owner_that_slept_too_long_notices_and_leaves_the_new_claim_alone(
    tmp_path: Path,
) -> None:
    with Claim(tmp_path, quiet.append) as held:
        hold(tmp_path)
        with pytest.raises(BusyError, match="silent for more than"):
            held.check()
    assert json.loads((tmp_path / "RUNNING").read_text())["id"] == "other"


def dead(identity: str) -> dict[str, Any]:
    """A process of this machine that is gone."""
    return {"id": identity, "host": socket.gethostname(), "pid": 0, "started": "1"}


def test_a_takeover_or_release_that_was_killed_stops_nobody(tmp_path: Path) -> None:
    hold(tmp_path, **dead("owner"))
    (tmp_path / ".RUNNING.owner").write_text(json.dumps(dead("taker")))
    (tmp_path / ".RUNNING.taker").write_text(json.dumps(dead("another taker")))
    with Claim(tmp_path, quiet.append) as held:
        held.check()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interrupted", [False, True], ids=["of the dead", "of a killed takeover"])
def test_of_many_that_want_to_take_over_one_does(tmp_path: Path, interrupted: bool) -> None:
    hold(tmp_path, **dead("owner"))
    if interrupted:
        (tmp_path / ".RUNNING.owner").write_text(json.dumps(dead("taker")))
    winners: list[Claim] = []
    start = threading.Barrier(8)

    def try_it() -> None:
        start.wait()
        try:
            winners.append(Claim(tmp_path, quiet.append))
        except BusyError:
            return

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    winners[0].check()
    winners[0].__exit__(None, None, None)
    assert os.listdir(tmp_path) == []


def test_a_stage_in_progress_elsewhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    with Claim(tmp_path / "meta", quiet.append), pytest.raises(BusyError, match=r"meta is being"):
        train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="meta")
    train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="meta")
    assert not (tmp_path / "meta" / "RUNNING").exists()


def test_pairs_and_a_joint_pass_exclude_each_other(tmp_path: Path) -> None:
    for stage in ("meta", "teacher"):
        train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage=stage)
    with Claim(tmp_path / "distill" / "joint", quiet.append), pytest.raises(BusyError):
        train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="distill", pair=0)
    with Claim(tmp_path / "distill" / "pair-01", quiet.append), pytest.raises(BusyError):
        train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="distill")
    assert not list(tmp_path.rglob("RUNNING"))


def test_settings_cannot_change_under_a_job_at_work(tmp_path: Path) -> None:
    train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="meta")
    changed = tiny_recipe(meta={"epochs": 1, "lr": 2e-3})
    with Claim(tmp_path / "meta", quiet.append), pytest.raises(BusyError):
        train(changed, tmp_path, Reporter(quiet=True), stage="meta")
    assert not (tmp_path / "superseded").exists()


def files_and_times(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_pairs_started_together_with_all_else_wait_and_write_to_their_folders_only(
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**VALUES, "baselines": []}))
    command = [sys.executable, "-m", "m2mkd.cli", "train", str(path), "--out", str(out), "--wait"]
    stages = (["distill", "--pair", "0"], ["distill", "--pair", "1"], ["teacher"])
    jobs = [
        subprocess.Popen([*command, "--stage", *stage], stderr=subprocess.PIPE, text=True)
        for stage in stages
    ]
    train(tiny_recipe(baselines=[]), out, Reporter(quiet=True), stage="meta")
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], errors
    assert all("waiting: stage distill needs" in text for text in errors[:2])
    before = files_and_times(out)
    train(tiny_recipe(baselines=[]), out, Reporter(quiet=True), stage="distill", pair=1)
    assert files_and_times(out) == before
    assert set(metrics(out)) == {
        *("meta", "incubation", "teacher", "distill/pair-00", "distill/pair-01")
    }


def test_a_pair_without_its_teacher_is_an_error_unless_it_waits(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs meta, which is not complete.*--wait"):
        train(tiny_recipe(), tmp_path, Reporter(quiet=True), stage="distill", pair=0)
    stop = StopRequest()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with stopping_on_signals(stop), pytest.raises(Preempted, match="while waiting"):
        train(
            *(tiny_recipe(), tmp_path, Reporter(quiet=True)),
            **{"stage": "distill", "pair": 0, "wait": True, "stop": stop},
        )
    timer.join()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_schedulers_signal_saves_and_exits_0_with_workers_too(tmp_path: Path, name: str) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**VALUES, "meta": {"epochs": 3000, "lr": 1e-3}}))
    command = [sys.executable, "-m", "m2mkd.cli", "train", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--set", "data.workers=1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (out / "meta" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.Signals[name])  # as schedulers do: workers get it as well
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert f"on {name}; state saved, queue the same command again" in errors
    steps = int(errors.partition("after step ")[2].split()[0])
    assert (out / "meta" / "last").read_text() == f"step_{steps:06d}"
    assert not (out / "meta" / "RUNNING").exists()


def test_a_terminal_that_closes_costs_no_step(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**VALUES, "meta": {"epochs": 3000, "lr": 1e-3}}))
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "m2mkd.cli", "train", str(path), "--out", str(out)],
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    while process.poll() is None and not (out / "meta" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    os.close(terminal)
    assert process.wait(timeout=300) == 130
    assert read_checkpoint(out / "meta" / (out / "meta" / "last").read_text()).meta["step"] > 0
    assert not (out / "meta" / "RUNNING").exists()


def test_a_terminal_may_close_when_the_output_was_closed_already() -> None:
    code = (
        "import os, signal; from m2mkd.train.stopping import StopRequest, stopping_on_signals\n"
        "os.close(1); os.close(2); stop = StopRequest()\n"
        "with stopping_on_signals(stop): os.kill(os.getpid(), signal.SIGHUP)\n"
        "assert stop.is_set\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
