"""Several processes with gloo: the results of one process, and an end for all when one ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import metrics, tiny_recipe

from m2mkd.errors import CheckpointError, ConfigError, TrainingError
from m2mkd.recipe import DataConfig, Recipe
from m2mkd.train.data import ImageData
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter
from m2mkd.train.world import World

# Sums over processes are taken in another order than sums over a batch.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 2e-5
HANGS = 300  # seconds after which a process hangs for certain


def plain_recipe(batch_size: int, **changes: Any) -> Recipe:
    """The tiny recipe without the noise that depends on who draws it; 96 images, two epochs."""
    settings: dict[str, Any] = {
        "data__batch_size": batch_size,
        "data__train_limit": 96,
        "data__augment": {"crop_scale": [0.7, 1.0], "label_smoothing": 0.1},
        "student__model_args__router_noise": 0.0,
        "student__model_args__num_experts": 4,
        # Adam would hide a gradient of the wrong size; this limit is reached at every step.
        "end_to_end": {"epochs": 2, "lr": 0.05, "optimizer": "momentum", "clip_grad": 0.3},
        "teacher__incubate__drop_path": 0.0,
        "baselines": ["end_to_end_only"],
        "checkpoint_every": 1,
    }
    return tiny_recipe(**{**settings, **changes})


def start(count: int, recipe: Recipe, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts the processes of a job as a scheduler would, without torchrun's watchdog."""
    path = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "m2mkd.cli", "train", str(path), "--out", str(folder / "run")]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and error output of each."""
    try:
        errors = [process.communicate(timeout=HANGS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, e) for p, e in zip(processes, errors, strict=True)]


def wait_until(holds: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    while not holds() and all(process.poll() is None for process in processes):
        time.sleep(0.01)


def assert_same_to_rounding(ours: Path, reference: Path) -> None:
    one, other = metrics(ours), metrics(reference)
    assert one.keys() == other.keys() and one
    for stage in one:
        for mine, theirs in zip(one[stage], other[stage], strict=True):
            assert mine["step"] == theirs["step"]
            if "loss" in mine:
                assert mine["loss"] == pytest.approx(theirs["loss"], abs=LOSS_TOLERANCE)
            else:
                grades = mine["validation"], theirs["validation"]
                assert grades[0]["count"] == grades[1]["count"] == 500
                assert grades[0]["loss"] == pytest.approx(grades[1]["loss"], abs=1e-5)
        weights = [
            load_file(run / stage / (run / stage / "last").read_text() / "model.safetensors")
            for run in (ours, reference)
        ]
        for name, value in weights[0].items():
            pair = [value, weights[1][name]]
            if name.endswith("attn.qkv.bias"):
                # The gradient of a key's bias is zero but for rounding, of which Adam makes a lot.
                pair = [torch.cat([b.chunk(3)[0], b.chunk(3)[2]]) for b in pair]
            torch.testing.assert_close(*pair, atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(plain_recipe(batch_size=32), out, Reporter(quiet=True))
    return out


def torchrun(recipe: Recipe, out: Path) -> str:
    """Runs a recipe in two processes; what they print."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [sys.executable, "-m", "m2mkd.cli", "train", str(path), "--out", str(out), "--json"]
    result = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *command], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of two processes with half the batch, and what they print."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, torchrun(plain_recipe(batch_size=16), out)


def test_two_processes_under_torchrun_equal_one_with_the_double_batch(
    one_process: Path, two_processes: tuple[Path, str]
) -> None:
    out, printed = two_processes
    assert printed.count('"accuracy"') == 1  # one process speaks
    assert_same_to_rounding(out, one_process)


@pytest.mark.slow
def test_shards_in_two_processes_equal_one_process_with_the_double_batch(
    one_process: Path, tmp_path: Path
) -> None:
    torchrun(plain_recipe(batch_size=16, parallel="fsdp"), tmp_path / "run")
    assert_same_to_rounding(tmp_path / "run", one_process)


def forget_last_step(stage: Path) -> None:
    """Leaves a complete stage as a kill before its last step would have."""
    last = stage / (stage / "last").read_text()
    assert last.name == "step_000006"
    shutil.rmtree(last)
    (stage / "DONE").unlink()


def test_experts_spread_over_two_processes_equal_one_process_with_the_double_batch(
    one_process: Path, two_processes: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two_processes[0], out)
    shutil.rmtree(out / "distill")
    shutil.rmtree(out / "baselines")
    forget_last_step(out / "end_to_end")  # goes on from whole weights and momentum
    spread = {"parallel": "experts", "data__batch_size": 8, "data__accumulate": 2}
    torchrun(plain_recipe(16, **spread, grad_checkpointing=True), out)
    assert not (out / "superseded").exists()  # the same digests
    assert_same_to_rounding(out, one_process)

    # And one process goes on, in the steps of two.
    forget_last_step(out / "baselines" / "end_to_end_only")
    train(plain_recipe(16), out, Reporter(quiet=True), stage="baselines")
    assert_same_to_rounding(out, one_process)


def test_accumulated_and_recomputed_steps_equal_plain_ones(
    one_process: Path, tmp_path: Path
) -> None:
    recipe = plain_recipe(batch_size=8, data__accumulate=4, grad_checkpointing=True)
    train(recipe, tmp_path / "run", Reporter(quiet=True))
    assert_same_to_rounding(tmp_path / "run", one_process)
    # The same digests: who runs out of memory may go on this way.
    train(plain_recipe(batch_size=32), tmp_path / "run", Reporter(quiet=True))
    assert not (tmp_path / "run" / "superseded").exists()


@pytest.mark.slow
def test_three_processes_stopped_through_one_of_them_go_on_to_the_same_end(tmp_path: Path) -> None:
    meta = {"epochs": 40, "lr": 1e-3}
    job = (3, plain_recipe(batch_size=8, meta=meta), tmp_path, "--stage", "meta")
    processes = start(*job)
    wait_until((tmp_path / "run" / "meta" / "metrics.jsonl").is_file, processes)
    processes[2].send_signal(signal.SIGUSR1)
    results = ends(processes)
    assert [code for code, _ in results] == [0, 0, 0], results
    assert "stopped in meta after step" in results[0][1] and "state saved" in results[0][1]
    assert not (tmp_path / "run" / "meta" / "DONE").exists()
    assert [code for code, _ in ends(start(*job))] == [0, 0, 0]
    recipe = plain_recipe(batch_size=24, meta=meta)
    train(recipe, tmp_path / "reference", Reporter(quiet=True), stage="meta")
    assert_same_to_rounding(tmp_path / "run", tmp_path / "reference")


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    recipe = plain_recipe(batch_size=16, meta={"epochs": 5000, "lr": 1e-3})
    processes = start(2, recipe, tmp_path, "--stage", "meta")
    wait_until((tmp_path / "run" / "meta" / "last").is_file, processes)
    processes[1].kill()
    (code, errors), _ = ends(processes)
    assert code == 1 and "Traceback" not in errors
    assert "Error: process 0 of 2 lost another one" in errors


def test_an_error_of_the_main_process_reaches_the_others(tmp_path: Path) -> None:
    (tmp_path / "run" / "meta").mkdir(parents=True)
    (tmp_path / "run" / "meta" / "DONE").write_text("[]")
    results = ends(start(2, plain_recipe(batch_size=16), tmp_path))
    assert [code for code, _ in results] == [1, 1]
    assert "remove it to redo its stage" in results[0][1]
    assert "process 1 stops because process 0 did" in results[1][1]


def batches_of(rank: int, size: int, **options: Any) -> ImageData:
    config = DataConfig(
        dataset="digits", image_size=8, channels=1, train_limit=50, eval_batch_size=200, **options
    )
    return ImageData(config, 0, World(rank, size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_out_a_step_as_one_process_would_see_it(size: int) -> None:
    whole = list(batches_of(0, 1, batch_size=4 * size).train_batches(1, first_step=1))
    parts = [list(batches_of(r, size, batch_size=4).train_batches(1, 1)) for r in range(size)]
    assert len({len(part) for part in parts}) == 1
    for number, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[number][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[number][1] for part in parts]))


@pytest.mark.parametrize(("size", "batch", "accumulate"), [(1, 4, 3), (2, 3, 2), (3, 4, 1)])
def test_any_number_of_processes_goes_on_in_the_steps_that_others_began(
    size: int, batch: int, accumulate: int
) -> None:
    whole = list(batches_of(0, 1, batch_size=12).train_batches(1, first_step=1))
    jobs = [batches_of(rank, size, batch_size=4).in_steps_of(12) for rank in range(size)]
    assert {(job.batch_size, job.accumulate) for job in jobs} == {(batch, accumulate)}
    assert jobs[0].steps_per_epoch == 4 and jobs[0].images_per_step == 12
    parts = [list(job.train_batches(1, first_step=1)) for job in jobs]
    for number, (images, labels) in enumerate(whole):
        step = slice(number * accumulate, (number + 1) * accumulate)
        mine = [batch for part in parts for batch in part[step]]
        assert torch.equal(images, torch.cat([x for x, _ in mine]))
        assert torch.equal(labels, torch.cat([y for _, y in mine]))


@pytest.mark.parametrize(
    ("images", "augment"), [(10, {}), (9, {"mixup": 0.2})], ids=["uneven", "odd, mixed in pairs"]
)
def test_steps_that_processes_cannot_share_are_named(images: int, augment: dict[str, Any]) -> None:
    data = batches_of(0, 3, batch_size=4, augment=augment)
    with pytest.raises(CheckpointError, match=f"steps of {images} images, which 3 processes"):
        data.in_steps_of(images)


def test_processes_evaluate_every_image_once_in_equally_many_batches() -> None:
    # 500 images in batches of 200: three batches for four processes.
    parts = [
        [len(y) for _, y in batches_of(r, 4, batch_size=4).own_validation_batches()]
        for r in range(4)
    ]
    assert parts == [[200], [200], [100], [0]]


def test_a_step_larger_than_the_training_set_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"takes 64 images .* there are 50 training images"):
        batches_of(0, 2, batch_size=16, accumulate=2)


def test_the_learning_rate_rule_scales_with_the_images_of_a_step(tmp_path: Path) -> None:
    recipe = plain_recipe(batch_size=16, data__accumulate=2, lr_base_size=64)
    train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    rates = [line["lr"] for line in metrics(tmp_path / "run")["meta"] if "lr" in line]
    # Of the three steps of an epoch the first after the warm-up has the peak rate: 1e-3 x 32 / 64.
    assert max(rates) <= 5e-4
    peak = plain_recipe(batch_size=32, lr_base_size=512, meta={"epochs": 1, "lr": 0.16})
    train(peak, tmp_path / "peak", Reporter(quiet=True), stage="meta")
    assert metrics(tmp_path / "peak")["meta"][0]["lr"] == pytest.approx(0.16 * 32 / 512)


def test_bf16_trains_under_both_ways_of_saving_memory(tmp_path: Path) -> None:
    recipe = plain_recipe(batch_size=16, precision="bf16", grad_checkpointing=True)
    train(recipe, tmp_path / "run", Reporter(quiet=True), stage="meta")
    assert (tmp_path / "run" / "meta" / "DONE").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_pairs_train_to_the_same_losses(one_process: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(one_process, out)
    shutil.rmtree(out / "distill")
    train(plain_recipe(32, compile=True), out, Reporter(quiet=True), stage="distill")
    ours, reference = metrics(out)["distill/joint"], metrics(one_process)["distill/joint"]
    assert len(ours) == len(reference) > 0
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_only_a_broken_connection_is_called_a_lost_process() -> None:
    world = World(0, 2)
    with pytest.raises(TrainingError, match="lost another one"), world.lost_peers_named():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer")
    with pytest.raises(RuntimeError, match="a bug"), world.lost_peers_named():
        raise RuntimeError("a bug")
