"""`m2mkd prune` as its user meets it."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from m2mkd.cli.main import main
from m2mkd.export.sources import with_root
from m2mkd.recipe import DataConfig
from m2mkd.train import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from nac_runs import write_nac_run


@pytest.fixture(autouse=True)
def short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_SECONDS", 1e-4)
    monkeypatch.setattr(prune, "_ROUNDS", 1)
    monkeypatch.setattr(prune, "_FRACTIONS", (1,))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_pruned_run_can_be_evaluated(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    shares = ("--mediators", "0.125", "--outputs", "0.5", "--layers", "0.5")
    result = run("prune", tmp_path / "run", *shares)
    assert result.exit_code == 0, result.output
    assert "3 of 24 mediators, 2 of 4 outputs, 1 of 2 layers kept" in result.stdout
    assert "24 mediators, 8 inputs, 4 outputs, 2 layers: top-1" in result.stderr
    pruned = json.loads((tmp_path / "run-pruned" / "pruning.json").read_text())
    evaluated = json.loads(run("evaluate", tmp_path / "run-pruned", "--json").stdout)
    assert evaluated["top1"] == pytest.approx(pruned["pruned"]["top1"], abs=1e-3)


def test_the_result_can_be_had_as_json(tmp_path: Path) -> None:
    write_nac_run(tmp_path / "run")
    result = run("prune", tmp_path / "run", "--budget", 100, "--out", tmp_path / "x", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "x" / "pruning.json").read_text())


@pytest.mark.parametrize("wishes", [(), ("--mediators", "0.5", "--budget", "1")])
def test_a_share_or_a_budget_has_to_be_given(wishes: tuple[str, ...], tmp_path: Path) -> None:
    result = run("prune", tmp_path, *wishes)
    assert result.exit_code == 2
    assert "give either --mediators or --budget" in result.stderr


def test_what_is_no_run_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, message in (("folder", "is not in a run folder"), ("none", "does not exist")):
        result = run("prune", tmp_path / source, "--mediators", "0.5")
        assert result.exit_code == 1
        assert f"{tmp_path / source} {message}" in result.stderr


@pytest.mark.parametrize("command", [("prune", "--mediators", "0.5"), ("evaluate",)])
def test_a_data_folder_that_has_vanished_is_asked_for(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    write_nac_run(tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"] |= {"dataset": "fashion_mnist", "root": str(tmp_path / "gone")}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run(command[0], tmp_path / "run", *command[1:])
    assert result.exit_code == 1
    assert f"fashion_mnist is not in {tmp_path / 'gone'}: there is no such folder" in result.stderr
    assert "--root FOLDER" in result.stderr


def test_a_data_folder_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    data = DataConfig(dataset="image_folder", root=Path("~/images"))
    assert with_root(data, None) == data
