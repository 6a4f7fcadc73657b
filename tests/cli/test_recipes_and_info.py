"""`m2mkd recipes` and `m2mkd info`."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner, Result

from m2mkd.cli.main import main
from m2mkd.ops import reference
from m2mkd.ops._load import EXTENSION
from m2mkd.recipe import Recipe, builtin_recipes

needs_kernels = pytest.mark.skipif(not EXTENSION.cpu, reason="the extension is not built")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_every_recipe_is_listed_with_its_first_line(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == list(builtin_recipes())
    assert all(len(line.split()) > 3 for line in lines)


def test_the_list_is_available_as_json() -> None:
    summaries = json.loads(run("recipes", "list", "--json").output)
    assert list(summaries) == list(builtin_recipes())
    for name, text in builtin_recipes().items():
        assert summaries[name] and summaries[name] in text.splitlines()[0]


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_shown_recipe_is_the_file_itself(name: str) -> None:
    assert run("recipes", "show", name).output == builtin_recipes()[name]


def test_an_unknown_recipe_is_answered_with_the_right_one() -> None:
    result = run("recipes", "show", "quickstrat")
    assert result.exit_code == 1
    assert "unknown recipe 'quickstrat'; did you mean 'quickstart'?" in result.stderr


def test_the_schema_is_that_of_recipes() -> None:
    schema = json.loads(run("recipes", "schema").output)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_info_is_readable_and_machine_readable() -> None:
    facts = json.loads(run("info", "--json").output)
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in facts["devices"]
    text = run("info").output
    for section in facts.values():
        for name, value in section.items():
            assert f"{name} " in text and str(value) in text


def test_info_names_the_compiled_kernels_or_why_there_are_none() -> None:
    facts = json.loads(run("info", "--json").output)
    if "topk_gate" in facts["kernels"]:
        assert "cpu" in facts["kernels"]["topk_gate"].split(", ")
        assert facts["build"]["torch_target"]
    else:
        assert facts["kernels"]["missing because"]


def test_info_says_why_kernels_are_missing() -> None:
    code = "from m2mkd.cli.main import main; main(['info', '--json'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "M2MKD_NO_EXTENSION": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    kernels = json.loads(result.stdout)["kernels"]
    assert (
        list(kernels) == ["missing because"] and "M2MKD_NO_EXTENSION" in kernels["missing because"]
    )


@needs_kernels
def test_the_selftest_shows_every_kernel_with_its_largest_error() -> None:
    result = run("info", "--selftest")
    assert result.exit_code == 0, result.stderr
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in result.output.splitlines()}
    assert rows["moe_mlp", "float32"][0] == "ok"
    assert 0 < float(rows["moe_mlp", "float32"][1]) < 1e-4
    facts = json.loads(run("info", "--selftest", "--json").output)
    assert facts["cpu"]["moe_mlp float32"]["problem"] == ""


@needs_kernels
def test_a_kernel_that_is_wrong_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "moe_gather", lambda x, plan: x[plan.token_of_M.long()] + 1)
    result = run("info", "--selftest")
    assert result.exit_code == 1
    assert "MISMATCH" in result.output and "value differs by" in result.output
    assert "moe_gather float32 on cpu" in result.stderr


def test_without_kernels_the_selftest_says_why() -> None:
    code = "from m2mkd.cli.main import main; main(['info', '--selftest'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "M2MKD_NO_EXTENSION": "1"},
        check=False,
    )
    assert result.returncode == 1
    assert "no compiled kernels to test: M2MKD_NO_EXTENSION=1 is set" in result.stderr
