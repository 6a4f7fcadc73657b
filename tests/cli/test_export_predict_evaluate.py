"""`m2mkd export`, `predict` and `evaluate` as their user meets them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from m2mkd.cli.main import main
from m2mkd.models.checkpoint import load_model
from m2mkd.recipe import DataConfig
from m2mkd.train.data import ImageData

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from small_runs import NAMES, make_card, write_images, write_run


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line_error(result: Result, *words: object, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    assert all(str(word) in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `run`, and `a.onnx` that the command made of it with `a.json` on its output."""
    made = tmp_path_factory.mktemp("cli")
    write_run(made / "run", make_card(), num_samples=3)
    result = run("export", made / "run", "-o", made / "a.onnx", "--target", "cpu", "--json")
    assert result.exit_code == 0, result.output
    (made / "a.json").write_text(result.stdout)
    return made


def test_export_prints_what_the_file_says_about_itself(folder: Path) -> None:
    facts = json.loads((folder / "a.json").read_text())
    assert facts["files"] == [str(folder / "a.onnx")]
    assert facts["bytes"] == (folder / "a.onnx").stat().st_size
    assert facts["operators"]["NonZero"] == 1
    assert facts["metadata"]["target"] == "cpu"
    assert facts["metadata"]["parity"]["inputs"] == "samples"


def test_export_says_what_was_verified_and_how(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    result = run("export", folder / "run", "-o", out, "--precision", "fp16")
    assert result.exit_code == 0, result.output
    for words in (
        f"{out}: vmoe_tiny_patch16_224, fp16",
        "experts as com.microsoft.MoE",
        "held-out images with CPUExecutionProvider",
        "accepted: 3.0e-02",
        "same best class for",
    ):
        assert words in result.stdout
    assert result.stderr == ""


def test_an_unverified_export_warns(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder / "run" / "end_to_end", "-o", tmp_path / "a.onnx", "--no-verify")
    assert result.exit_code == 0
    assert result.stderr.startswith("WARNING: ") and "NOT verified" in result.stderr
    assert "verified on" not in result.stdout


def test_a_failed_export_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_card(act_layer="gelu"))
    out = tmp_path / "out"
    out.mkdir()
    result = run("export", tmp_path / "run", "-o", out / "a.onnx")
    assert_one_line_error(result, "erf form of GELU", "--tolerance")
    assert list(out.iterdir()) == []


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_card())
    (tmp_path / "run" / "end_to_end" / "DONE").unlink()
    result = run("export", tmp_path / "run", "-o", tmp_path / "a.onnx")
    assert_one_line_error(result, "not finished", "m2mkd train")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("export", tmp_path / "nothing", "-o", tmp_path / "a.onnx")
    assert_one_line_error(result, tmp_path / "nothing", "does not exist")


def test_a_tolerance_needs_verification(tmp_path: Path) -> None:
    result = run("export", tmp_path, "-o", "a.onnx", "--no-verify", "--tolerance", "0.1")
    assert result.exit_code == 2


def test_predictions_are_plain_lines_when_not_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 2)
    result = run("predict", folder / "a.onnx", *paths, "--top", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in paths]
    for line in lines:
        for answer in line.partition(": ")[2].split(", "):
            name, percent = answer.split()
            assert name in NAMES and 0 < float(percent.rstrip("%")) <= 100


def test_bad_images_come_after_the_good_answers(folder: Path, tmp_path: Path) -> None:
    good = write_images(tmp_path, 2)
    (tmp_path / "bad.png").write_text("not an image")
    result = run("predict", folder / "a.onnx", tmp_path / "missing.png", tmp_path)
    assert result.exit_code == 1
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [
        str(path) for path in good
    ]
    errors = result.stderr.splitlines()
    assert len(errors) == 2 and all(line.startswith("Error: cannot read") for line in errors)
    assert "missing.png" in errors[0] and "bad.png" in errors[1]


def test_predictions_as_json_hold_answers_and_failures(folder: Path, tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    result = run("predict", folder / "a.onnx", path, "missing.png", "--json", "--top", "3")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["model"] == str(folder / "a.onnx")
    (prediction,), (failure,) = answer["predictions"], answer["failed"]
    assert prediction["image"] == str(path) and len(prediction["top"]) == 3
    assert set(prediction["top"][0]) == {"class", "probability"}
    assert failure["image"] == "missing.png" and "no such file" in failure["error"]


def test_on_a_terminal_predictions_are_a_table(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (path,) = write_images(tmp_path / "[bold]x", 1)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["predict", str(folder / "a.onnx"), str(path), "--top", "2"], standalone_mode=False)
    table = capsys.readouterr().out
    assert "class 2" in table and "probability" in table
    assert "[bold]x/0.png" in table


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("nothing")
    assert_one_line_error(run("predict", tmp_path / "a.onnx", "x.png"), "cannot load", "a.onnx")
    assert_one_line_error(run("evaluate", tmp_path / "a.onnx"), "cannot load", "a.onnx")
    assert_one_line_error(run("evaluate", tmp_path / "b.onnx"), "b.onnx does not exist")


def accuracy(*arguments: object) -> dict[str, float]:
    result = run("evaluate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, float] = json.loads(result.stdout)
    return values


def test_run_and_file_have_the_same_accuracy_and_it_is_right(folder: Path) -> None:
    of_run, of_file = accuracy(folder / "run"), accuracy(folder / "a.onnx")
    network, _ = load_model(folder / "run")
    config = DataConfig(dataset="digits", image_size=8, channels=1, mean=(0.5,), std=(0.25,))
    ((images, labels),) = ImageData(
        config.model_copy(update={"eval_batch_size": 1000}), seed=0
    ).validation_batches()
    with torch.inference_mode():
        right = (network(images).argmax(dim=1) == labels).float().mean()
    assert of_run["count"] == of_file["count"] == len(labels) == 500
    assert of_run["top1"] == of_file["top1"] == pytest.approx(100 * float(right), abs=1e-3)
    assert of_run["top1"] < of_run["top5"] == of_file["top5"]
    assert of_run["loss"] == pytest.approx(of_file["loss"], abs=1e-4)


def test_accuracy_is_a_line_for_people(folder: Path) -> None:
    result = run("evaluate", folder / "a.onnx")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{folder / 'a.onnx'}: top-1 ")
    assert "on 500 validation images" in result.stdout


def test_digits_have_no_root(folder: Path) -> None:
    result = run("evaluate", folder / "a.onnx", "--root", folder)
    assert_one_line_error(result, "digits", "leave out --root")


def image_folder(root: Path, classes: list[str]) -> Path:
    for split in ("train", "val"):
        for name in classes:
            write_images(root / split / name, 2)
    return root


def test_root_moves_the_data_set_and_its_classes_must_be_the_same(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", make_card())
    recipe = source / "recipe.yaml"
    moved = recipe.read_text().replace("dataset: digits", "dataset: image_folder\n  root: gone")
    recipe.write_text(moved)
    assert_one_line_error(run("evaluate", source), "gone")
    right = image_folder(tmp_path / "right", NAMES)
    assert accuracy(source, "--root", right)["count"] == 20
    wrong = image_folder(tmp_path / "wrong", ["cat", "dog"])
    result = run("evaluate", source, "--root", wrong)
    assert_one_line_error(result, "cat, dog (2) instead of 0, 1, 2, ... (10)")


def test_a_part_of_the_classes_is_answered_among_these(folder: Path, tmp_path: Path) -> None:
    some = image_folder(tmp_path / "some", ["1", "3", "7"])
    changed = ("--data", "dataset=image_folder", "--data", f"root={some}")
    for source in (folder / "run", folder / "a.onnx"):
        result = run("evaluate", source, *changed)
        assert result.exit_code == 0, result.output
        assert "on 6 validation images of 3 of its 10 classes" in result.stdout
        assert accuracy(source, *changed)["top5"] == 100.0


def test_data_must_fit_the_network(folder: Path) -> None:
    result = run("evaluate", folder / "run", "--data", "image_size=16")
    assert_one_line_error(result, "takes image_size 8")
    result = run("evaluate", folder / "run", "--data", "datset=digits")
    assert_one_line_error(result, "unknown key 'data.datset'; did you mean 'dataset'?")


def test_few_shot_and_linear_probe_are_one_line_and_json(folder: Path) -> None:
    result = run("evaluate", folder / "run", "--few-shot", "3x2", "--draws", 3)
    assert result.exit_code == 0, result.output
    assert "3-way 2-shot top-1" in result.stdout and "(95 %, 3 draws)" in result.stdout
    result = run("evaluate", folder / "run", "--few-shot", "3x2", "--draws", 3, "--json")
    values = json.loads(result.stdout)
    assert [len(draw["classes"]) for draw in values["draws"]] == [3, 3, 3]
    assert values["top1"] == pytest.approx(sum(d["top1"] for d in values["draws"]) / 3)
    result = run("evaluate", folder / "run", "--linear-probe", "--json")
    assert json.loads(result.stdout)["count"] == 500


@pytest.mark.parametrize("wrong", ["8", "8x", "1x5", "8x0", "axb"])
def test_few_shot_is_ways_times_shots(folder: Path, wrong: str) -> None:
    result = run("evaluate", folder / "run", "--few-shot", wrong)
    assert result.exit_code == 2 and "is not WAYSxSHOTS, such as 8x5" in result.stderr


def test_a_file_cannot_be_given_a_new_head(folder: Path) -> None:
    for option in (("--linear-probe",), ("--few-shot", "3x2")):
        result = run("evaluate", folder / "a.onnx", *option)
        assert result.exit_code == 2 and "need a run, not an ONNX file" in result.stderr


def test_an_evaluation_set_cannot_train_a_new_head(folder: Path, tmp_path: Path) -> None:
    for name in NAMES[:2]:
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
    changed = ("--data", "dataset=imagenet_r", "--data", f"root={tmp_path}")
    for option in (("--linear-probe",), ("--few-shot", "2x1")):
        result = run("evaluate", folder / "run", *changed, *option)
        assert_one_line_error(result, "for evaluation only", "needs training images")


def test_damage_of_a_run_is_kept_for_its_report(folder: Path, tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", make_card())
    result = run("evaluate", source, "--corruptions")
    assert result.exit_code == 0, result.output
    assert "damaged" in result.stdout and "gaussian_noise" in result.stdout
    kept = json.loads((source / "corruptions.json").read_text())
    assert set(map(len, kept["top1"].values())) == {5}
    (source / "corruptions.json").unlink()
    result = run("evaluate", source, "--corruptions", "--data", "on_bad_image=skip", "--json")
    assert json.loads(result.stdout)["top1"] == kept["top1"]
    assert not (source / "corruptions.json").exists()


def test_a_checkpoint_outside_a_run_has_no_data_set(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_card())
    stage = (tmp_path / "run" / "end_to_end").rename(tmp_path / "stage")
    assert_one_line_error(run("evaluate", stage), "its data set is not known")
    made = run("export", stage, "-o", tmp_path / "a.onnx", "--no-verify")
    assert made.exit_code == 0
    assert_one_line_error(run("evaluate", tmp_path / "a.onnx"), "does not say what its data set is")
