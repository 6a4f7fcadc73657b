"""Runs that are killed, damaged, starved of disk or memory: they go on from the last good state."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import bad_days
from tiny import metrics, tiny_recipe

from m2mkd.distill import SupervisedTask
from m2mkd.errors import CheckpointError, DataError, TrainingError
from m2mkd.models.checkpoint import newest_checkpoint, read_checkpoint
from m2mkd.recipe import Recipe
from m2mkd.train import data as data_module
from m2mkd.train.execute import train
from m2mkd.train.failures import failures_named
from m2mkd.train.progress import Reporter

# Python 3.12 and later warn when a process with threads forks.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def short_recipe(**changes: Any) -> Recipe:
    """The meta stage of the tiny recipe, ten steps, a checkpoint at each."""
    return tiny_recipe(checkpoint_every=1, **changes)


class Messages(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Killed(BaseException):
    """Nothing gets a chance to save."""


class DyingAtStep10(Reporter):
    """Ends the run before its last step is saved."""

    def step(self, done: int, **numbers: float) -> None:
        super().step(done, **numbers)
        if done == 10:
            raise Killed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The meta stage, killed with checkpoints of steps 8 and 9."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Killed):
        train(short_recipe(), out, DyingAtStep10(quiet=True), stage="meta")
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The meta stage, undisturbed."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(short_recipe(), out, Reporter(quiet=True), stage="meta")
    return out


def test_a_few_kills_and_damages_change_nothing(tmp_path: Path) -> None:
    recipe = short_recipe(baselines=[])
    train(recipe, tmp_path / "reference", Reporter(quiet=True))
    counts = bad_days.campaign(tmp_path, recipe, tmp_path / "reference", kills=4, seed=1)
    assert counts["kills"] >= 4


@pytest.mark.slow
def test_sixty_kills_over_all_stages_change_nothing(tmp_path: Path) -> None:
    recipe = bad_days.long_recipe()
    train(recipe, tmp_path / "reference", Reporter(quiet=True))
    counts = bad_days.campaign(tmp_path, recipe, tmp_path / "reference", kills=60, seed=0)
    assert counts["kills"] >= 60 and counts["while writing a checkpoint"] >= 5
    assert counts["truncate"] and counts["flip"] and counts["warnings"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_damage_to_any_file_of_the_newest_checkpoint_is_passed_over_with_one_warning(
    stopped: Path, reference: Path, tmp_path: Path, name: str, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    victim = out / "meta" / "step_000009" / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content[: len(content) // 2] if how == "truncate" else content)
    messages = Messages()
    train(short_recipe(), out, messages, stage="meta")
    warnings = [line for line in messages.lines if "going on from an earlier step" in line]
    assert len(warnings) == 1 and "step_000009" in warnings[0]
    assert metrics(out) == metrics(reference)


def test_a_complete_stage_whose_result_was_damaged_is_mended(
    reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    weights = out / "meta" / "step_000010" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    messages = Messages()
    train(short_recipe(), out, messages, stage="meta")
    assert sum("going on from an earlier step" in line for line in messages.lines) == 1
    assert weights.read_bytes() == good


def test_every_flipped_bit_of_a_meta_json_is_noticed(reference: Path, tmp_path: Path) -> None:
    step = tmp_path / "step_000010"
    shutil.copytree(reference / "meta" / "step_000010", step)
    path = step / "meta.json"
    good = path.read_bytes()
    before = read_checkpoint(step).meta
    for position in range(0, len(good), 7):
        path.write_bytes(
            good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :]
        )
        try:
            after = read_checkpoint(step).meta
        except CheckpointError:
            continue
        assert after == before  # white space


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(
    reference: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    code = """
import shutil, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import tiny_recipe
from m2mkd.errors import CheckpointError
from m2mkd.train.progress import Reporter
from m2mkd.train.execute import train
disk, result = sys.argv[2:]
recipe, run = tiny_recipe(checkpoint_every=1), Path(disk) / "run"
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
mount("size=64m")
used = 0
for size in (200, 300, 400):
    mount(f"remount,size={size}k")
    try:
        train(recipe, run, Reporter(quiet=True), stage="meta")
    except CheckpointError as error:
        print(error)
        used += "the disk is full" in str(error)
mount("remount,size=64m")
train(recipe, run, Reporter(quiet=True), stage="meta")
shutil.copytree(run, result)
print("times full:", used)
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(disk)]
    result = subprocess.run(
        ["unshare", "-rm", *command, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.rpartition("times full: ")[2]) >= 1, result.stdout
    assert bad_days.differences(tmp_path / "run", reference) == []


def test_memory_that_runs_out_names_the_batch_size_and_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = SupervisedTask.forward, [0]

    def greedy(self: SupervisedTask, images: Tensor, targets: Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            torch.empty(1 << 58, dtype=torch.uint8)
        return original(self, images, targets)

    monkeypatch.setattr(SupervisedTask, "forward", greedy)
    with pytest.raises(TrainingError, match=r"stage meta: out of memory at data.batch_size 32;"):
        train(short_recipe(), tmp_path, Reporter(quiet=True), stage="meta")
    assert newest_checkpoint(tmp_path / "meta")[0] is not None

    def on_gpu(self: SupervisedTask, images: Tensor, targets: Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(SupervisedTask, "forward", on_gpu)
    with pytest.raises(TrainingError) as caught:
        train(short_recipe(), tmp_path, Reporter(quiet=True), stage="meta")
    for remedy in ("out of GPU memory", "data.batch_size: 16 with data.accumulate: 2", "bf16"):
        assert remedy in str(caught.value)


def test_a_run_short_of_memory_goes_on_with_smaller_batches(tmp_path: Path) -> None:
    plain = {"data__augment": {}, "meta": {"epochs": 2, "lr": 1e-3}}
    train(short_recipe(**plain), tmp_path / "whole", Reporter(quiet=True), stage="meta")
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(short_recipe(**plain), out, DyingAtStep10(quiet=True), stage="meta")
    smaller = short_recipe(**plain, data__batch_size=16, data__accumulate=2)
    train(smaller, out, Reporter(quiet=True), stage="meta")
    ours, whole = metrics(out)["meta"], metrics(tmp_path / "whole")["meta"]
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    assert ours[-1]["validation"]["loss"] == pytest.approx(
        whole[-1]["validation"]["loss"], abs=1e-4
    )


class _DyingReader(data_module._BatchReader):
    """A worker that is killed at its third batch, as by a kernel short of memory."""

    calls = 0

    def __getitem__(self, indices: list[int]) -> Any:
        type(self).calls += 1
        if self.calls == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(indices)


def test_a_data_worker_that_dies_is_one_error_and_the_run_goes_on(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_BatchReader", _DyingReader)
        with pytest.raises(TrainingError, match=r"a data loading process died .*data\.workers"):
            recipe = short_recipe(data__workers=1)
            train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    train(short_recipe(), tmp_path / "run", Reporter(quiet=True), stage="meta")
    assert bad_days.differences(tmp_path / "run", reference) == []


def test_a_data_worker_that_dies_while_it_sends_a_batch_is_named_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> Iterator[data_module._Batch]:
        yield data_module._Batch(torch.zeros(1), torch.zeros(1), [])
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(data_module, "_SIGNAL_SECONDS", 0.0)
    batches = data_module._with_deaths_told(broken())
    assert next(batches).unreadable == []
    with (
        pytest.raises(TrainingError, match=r"a data loading process died .*data\.workers"),
        failures_named("stage meta", short_recipe(), is_training=True),
    ):
        next(batches)


def test_data_that_vanishes_mid_run_is_named_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    images, away = tmp_path / "images", tmp_path / "away"
    noise = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (images / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = noise.randint(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / name / f"{number}.png")
    folder = {"dataset": "image_folder", "root": str(images), "image_size": 8, "channels": 1}
    recipe = short_recipe(data={**folder, "batch_size": 4})

    class Unmounting(Reporter):
        def step(self, done: int, **numbers: float) -> None:
            super().step(done, **numbers)
            if done == 3 and not away.exists():
                images.rename(away)

    with pytest.raises(DataError, match=r"images/train/(ant|bee)/\d\.png"):
        train(recipe, tmp_path / "run", Unmounting(quiet=True), stage="meta")
    away.rename(images)
    train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    train(recipe, tmp_path / "whole", Reporter(quiet=True), stage="meta")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
