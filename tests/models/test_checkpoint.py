"""Checkpoint folders: written whole or not at all, and checked when read."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch

from m2mkd.errors import CheckpointError
from m2mkd.models import checkpoint as checkpoints
from m2mkd.models.checkpoint import (
    ModelCard,
    amend_checkpoint,
    load_model,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from m2mkd.nn import graphs

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2)}


def write(stage: Path, step: int, **options: object) -> Path:
    state = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": [0.1]}}
    return write_checkpoint(stage, step, WEIGHTS, meta={"note": "x"}, state=state, **options)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "stage", 5)
    assert folder.name == "step_000005" and (tmp_path / "stage" / "last").read_text() == folder.name
    checkpoint = read_checkpoint(folder)
    assert all(torch.equal(checkpoint.weights[k], v) for k, v in WEIGHTS.items())
    assert checkpoint.meta["note"] == "x" and checkpoint.meta["step"] == 5
    assert checkpoint.state()["optimizer"]["lr"] == [0.1]


def test_the_two_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
        amend_checkpoint(tmp_path, step, {"accuracy": 7.0 / step}, is_best=step == 1)
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == ["step_000001", "step_000003", "step_000004"]
    assert (tmp_path / "best").read_text() == "step_000001"
    meta = read_checkpoint(tmp_path / "step_000001").meta
    assert meta["accuracy"] == 7.0 and meta["note"] == "x"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_any_damage_is_noticed_and_an_earlier_step_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        position = data.index(b"sha256") if name == "meta.json" else len(data) // 2
        data[position] ^= 1
        path.write_bytes(data)
    checkpoint, problems = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.meta["step"] == 1
    assert len(problems) == 1 and "step_000002" in problems[0]


def test_a_full_disk_leaves_earlier_checkpoints_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full; free some space"):
        write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_000001"]
    checkpoint, problems = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.meta["step"] == 1 and problems == []


def test_a_foreign_folder_and_a_newer_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint of m2mkd: no meta\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not written by m2mkd"):
        read_checkpoint(tmp_path)
    folder = write(tmp_path / "stage", 1)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        read_checkpoint(folder)


def test_pickled_code_in_a_state_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    torch.save({"optimizer": Evil()}, folder / "state.pt")
    with pytest.raises(CheckpointError, match="cannot read training state"):
        checkpoints.Checkpoint(folder, {}, {}).state()


def test_loading_a_nac_fits_no_signatures_to_its_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nac = timm.create_model("nac_digits").eval()
    card = ModelCard("nac_digits", {}, [1] * 4, 10, 8, 1, [str(i) for i in range(10)], {})
    write_checkpoint(tmp_path, 1, nac.state_dict(), meta={"card": asdict(card)})

    def refuse(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError("signatures were fitted, to be overwritten")

    monkeypatch.setattr(graphs, "prior_signatures", refuse)
    loaded, _ = load_model(tmp_path)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(images), nac(images), atol=0, rtol=0)
