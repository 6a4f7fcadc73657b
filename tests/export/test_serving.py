"""Loading exported files, reading what they say, and classifying images with them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from m2mkd.export.errors import ModelFileError, RuntimeLoadError
from m2mkd.export.exporter import export_run
from m2mkd.export.metadata import FORMAT, read_metadata
from m2mkd.export.predict import predict
from m2mkd.export.preprocess import prepare, read_image
from m2mkd.export.session import OnnxClassifier
from m2mkd.models.checkpoint import load_model

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import NAMES, SIZE, make_card, write_images, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), make_card())


@pytest.fixture(scope="module")
def file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("file") / "a.onnx", target="cpu").path


def test_predictions_are_the_softmax_of_the_network(file: Path, run: Path, tmp_path: Path) -> None:
    import torch

    paths = write_images(tmp_path, 40)  # more than one batch
    network, checkpoint = load_model(run)
    pixels = [prepare(read_image(path, 1), checkpoint.card.preprocessing) for path in paths]
    expected = network(torch.from_numpy(np.stack(pixels))).softmax(dim=1).detach().numpy()
    found = list(predict(OnnxClassifier(file), paths, top=3))
    assert [answer.image for answer in found] == paths
    for answer, row in zip(found, expected, strict=True):
        best = np.argsort(-row)[:3]
        assert [name for name, _ in answer.top] == [NAMES[i] for i in best]
        np.testing.assert_allclose([value for _, value in answer.top], row[best], atol=1e-5)


def test_folders_are_searched_for_images_in_order(file: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "notes.txt").write_text("no image, and passed over")
    Image.new("RGB", (30, 20)).save(tmp_path / "UPPER.JPG")
    found = predict(OnnxClassifier(file), [tmp_path, tmp_path / "b" / "0.png"], top=1)
    names = [str(answer.image.relative_to(tmp_path)) for answer in found]
    assert names == ["UPPER.JPG", "a/deep/0.png", "b/0.png", "b/1.png", "b/0.png"]


def test_unreadable_files_do_not_keep_others_from_being_classified(
    file: Path, tmp_path: Path
) -> None:
    good = write_images(tmp_path / "good", 2)
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "missing.png", good[0], tmp_path / "empty", good[1]]
    found = list(predict(OnnxClassifier(file), paths, top=1))
    assert [answer.image for answer in found] == paths
    assert [bool(answer.top) for answer in found] == [False, True, False, True]
    assert "no such file" in str(found[0].problem)
    assert "holds no image files" in str(found[2].problem)
    assert found[0].to_dict() == {"image": str(paths[0]), "error": found[0].problem}


def test_more_classes_than_there_are_means_all(file: Path, tmp_path: Path) -> None:
    (answer,) = predict(OnnxClassifier(file), write_images(tmp_path, 1), top=99)
    assert sorted(name for name, _ in answer.top) == sorted(NAMES)
    assert sum(value for _, value in answer.top) == pytest.approx(1.0, abs=1e-5)


def test_large_logits_give_finite_probabilities(file: Path, monkeypatch: Any) -> None:
    classifier = OnnxClassifier(file)
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    monkeypatch.setattr(classifier, "logits", lambda _: logits)
    assert classifier.probabilities(logits).tolist() == [[1.0, 0.0, 0.0]]


def test_metadata_survive_the_file(file: Path) -> None:
    props = {item.key: item.value for item in onnx.load(file).metadata_props}
    assert all(key.startswith("m2mkd.") for key in props)
    assert json.loads(props["m2mkd.class_names"]) == NAMES
    assert read_metadata(props, source="a") == OnnxClassifier(file).metadata


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"m2mkd.format": None}, "not written by `m2mkd export`"),
        (
            {"m2mkd.format": str(FORMAT + 1)},
            f"has format {FORMAT + 1}, this version reads {FORMAT}",
        ),
        ({"m2mkd.class_names": "[1,"}, "damaged: .*; export it again"),
        ({"m2mkd.class_names": None}, "damaged: .*; export it again"),
        ({"m2mkd.surprise": "1"}, "damaged: .*; export it again"),
    ],
)
def test_metadata_that_cannot_be_used_are_refused(
    change: dict[str, str | None], match: str, file: Path
) -> None:
    props = {item.key: item.value for item in onnx.load(file).metadata_props}
    for key, value in change.items():
        if value is None:
            del props[key]
        else:
            props[key] = value
    with pytest.raises(ModelFileError, match=match):
        read_metadata(props, source="a.onnx")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(
        RuntimeLoadError, match=r"cannot load .*bad\.onnx.*exported again$"
    ) as caught:
        OnnxClassifier(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist, or is not a file"):
        OnnxClassifier(tmp_path / name)


def test_a_batch_of_the_wrong_size_is_one_line(file: Path) -> None:
    images = np.zeros((1, 1, SIZE + 1, SIZE), np.float32)
    with pytest.raises(RuntimeLoadError, match=r"failed on a batch \(1, 1, 9, 8\)") as caught:
        OnnxClassifier(file).logits(images)
    assert "\n" not in str(caught.value)


def test_a_missing_runtime_is_named_with_its_remedy(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeLoadError, match=r"pip install m2mkd\[serve\]"):
        OnnxClassifier(file)
