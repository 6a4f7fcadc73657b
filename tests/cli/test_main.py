"""The command group: what it imports, its exit codes and its one-line errors."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

import m2mkd
from m2mkd.cli import main as group
from m2mkd.cli.main import main
from m2mkd.errors import ConfigError

COMMANDS = [
    "train",
    "launch",
    "evaluate",
    "report",
    "import",
    "prune",
    "export",
    "predict",
    "recipes",
    "info",
]
HEAVY = ("torch", "timm", "onnx", "onnxruntime", "pydantic", "numpy", "rich")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def imported_by(*arguments: str) -> str:
    code = (
        "import sys\n"
        "from m2mkd.cli.main import main\n"
        f"main({list(arguments)}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments) == "[]"


def test_help_names_every_command_and_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS
    assert "Example: m2mkd train quickstart" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_short_verb_phrase_and_ends_with_an_example(name: str) -> None:
    help_line = group._COMMANDS[name][1]
    assert len(help_line) < 60 and help_line.endswith(".") and help_line[0].isupper()
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.name == name
    last = str(command.help).strip().splitlines()[-1].strip()
    assert last.startswith(f"Example: m2mkd {name}")
    assert run(name, "--help").exit_code == 0


def test_the_version_is_the_package_s() -> None:
    assert m2mkd.__version__ in run("--version").output


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    result = run("exprt", "x")
    assert result.exit_code == 2
    assert "no command 'exprt'; did you mean 'export'?" in result.stderr


@pytest.mark.parametrize("arguments", [["export"], ["predict", "a.onnx"], ["export", "-x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Makes `m2mkd info` raise the exception put into the list."""
    errors: list[BaseException] = []

    @click.command("info")
    def info() -> None:
        raise errors[0]

    monkeypatch.setattr("m2mkd.cli.info.info", info)
    yield errors


def test_an_expected_failure_is_one_line_and_exit_code_1(failing: list[BaseException]) -> None:
    failing.append(ConfigError("first\nsecond"))
    result = run("info")
    assert result.exit_code == 1
    assert (result.stdout, result.stderr) == ("", "Error: first second\n")


@pytest.mark.parametrize("arguments", [["-v", "info"], ["info", "-v"], ["info", "--verbose"]])
def test_verbose_adds_the_traceback(arguments: list[str], failing: list[BaseException]) -> None:
    failing.append(ConfigError("first"))
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "test_main.py" in result.stderr
    assert result.stderr.endswith("Error: first\n")


def test_an_unexpected_failure_keeps_its_traceback(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("a bug"))
    result = run("info")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_is_one_line_and_exit_code_130(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    result = run("info")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"
