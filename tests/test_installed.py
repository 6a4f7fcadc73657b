"""The installed package: its metadata, its folder map, and that nothing leaks to the top level."""

import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools

import m2mkd

ROOT = Path(__file__).resolve().parents[1]

try:
    DISTRIBUTION = metadata.distribution("m2mkd")
except metadata.PackageNotFoundError:
    pytest.skip("m2mkd is not installed here; `make test` installs it", allow_module_level=True)


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools, without building anything."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py", run_name="__main__")
    return given


def _run(code: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_version_is_the_one_in_the_metadata() -> None:
    assert m2mkd.__version__ == DISTRIBUTION.version


def test_console_script_is_installed_and_points_at_the_command_line() -> None:
    (script,) = DISTRIBUTION.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("m2mkd", "m2mkd.cli.main:main")
    assert (Path(sys.executable).parent / "m2mkd").is_file()


def test_types_are_announced_to_users() -> None:
    assert (Path(m2mkd.__path__[0]) / "py.typed").is_file()


@pytest.mark.parametrize("place", ["checkout", "empty folder"])
def test_export_and_cli_are_not_top_level_modules(place: str, tmp_path: Path) -> None:
    code = (
        "import sys, m2mkd.cli.main, m2mkd.export\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('export', 'cli')])"
    )
    folder = ROOT if place == "checkout" else tmp_path
    assert _run(code, folder) == "[]\n"


def test_importing_m2mkd_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, m2mkd, m2mkd.cli.main; print('torch' in sys.modules)"
    assert _run(code, tmp_path) == "False\n"


@pytest.mark.parametrize("room", ["export", "cli"])
def test_links_for_tools_lead_to_the_real_folders(room: str) -> None:
    link = ROOT / "m2mkd" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_setup_lists_every_folder_that_holds_python(setup_arguments: dict[str, Any]) -> None:
    # rglob does not follow links, so m2mkd/export and m2mkd/cli are not met twice.
    sources = [path for room in ("m2mkd", "export", "cli") for path in (ROOT / room).rglob("*.py")]
    folders = {path.relative_to(ROOT).parent.parts for path in sources}
    expected = {".".join(parts if parts[0] == "m2mkd" else ("m2mkd", *parts)) for parts in folders}
    assert set(setup_arguments["packages"]) == expected
