"""`m2mkd train` as its user meets it: output, exit codes and one-line errors."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from m2mkd.cli.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from tiny import VALUES


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line_error(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


def test_a_run_prints_a_table_and_then_json(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", recipe, "--out", out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    for name in ("m2mkd", "teacher", "end_to_end_only", "equal_updates", "logit_kd"):
        assert f"{summary['accuracy'][name]:.2f} %" in result.stdout
    again = run("train", recipe, "--out", out, "--json")
    assert json.loads(again.stdout) == summary
    assert "end_to_end: complete" in again.stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", recipe, "--out", out, "--dry-run", "--set", "end_to_end.epochs=7")
    assert result.exit_code == 0, result.output
    assert not out.exists()
    assert "end_to_end" in result.stdout and "7 epochs" in result.stdout
    assert result.stdout.count("to do") == 8


def test_stages_one_by_one_and_a_pair_alone_make_a_run(recipe: Path, tmp_path: Path) -> None:
    common = ("train", recipe, "--out", tmp_path / "run", "--set", "baselines=[]")
    for arguments in (
        ("--stage", "meta"),
        ("--stage", "teacher"),
        ("--stage", "distill", "--pair", 1),
        ("--stage", "distill", "--pair", 0),
        ("--stage", "end_to_end"),
    ):
        result = run(*common, *arguments)
        assert result.exit_code == 0 and result.stdout == "", result.output
    result = run(*common, "--stage", "evaluate", "--json")
    assert json.loads(result.stdout)["accuracy"]["m2mkd"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quickstrat",), ("unknown recipe", "did you mean 'quickstart'")),
        (("quickstart", "--set", "end_to_end.epoch=3"), ("unknown key", "did you mean 'epochs'")),
        (("quickstart", "--set", "meta.lr=fast"), ("meta.lr='fast'",)),
        (("quickstart", "--set", "teacher.depths=[1,2,3]"), ("sums to 6",)),
        (("quickstart", "--set", "data.dataset=image_folder"), ("set data.root",)),
        (
            ("quickstart", "--set", "data.dataset=image_folder", "--set", "data.root=/no/where"),
            ("/no/where",),
        ),
        (("quickstart", "--set", "student.depths=[2,2]"), ("2 modules",)),
        (("quickstart", "--stage", "distill", "--pair", "9"), ("not complete",)),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    result = run("train", *arguments, "--out", tmp_path / "run")
    assert_one_line_error(result, *words)


def test_a_pair_without_its_stage_is_a_usage_error() -> None:
    result = run("train", "quickstart", "--pair", "1")
    assert_one_line_error(result, "--pair goes with --stage distill", code=2)


def test_a_pair_that_does_not_exist_is_named(recipe: Path, tmp_path: Path) -> None:
    common = ("train", recipe, "--out", tmp_path / "run")
    for stage in ("meta", "teacher"):
        assert run(*common, "--stage", stage).exit_code == 0
    result = run(*common, "--stage", "distill", "--pair", "5")
    assert_one_line_error(result, "--pair 5 does not exist", "0 to 1")
