"""The import arrows between the rooms, read from the sources without importing them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room may import itself, `ANYWHERE` and the rooms named here.
ARROWS: dict[str, set[str]] = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "distill": {"ops", "nn", "models"},
    "train": {"ops", "nn", "models", "distill"},
    "export": {"ops", "nn", "models"},
    "cli": {"ops", "nn", "models", "distill", "train", "export"},
}
ANYWHERE = {"errors", "recipe", "__version__"}

# Libraries that only one room may know, so that the others can be used without them.
FENCED = {"click": "cli", "onnx": "export", "onnxruntime": "export", "onnxscript": "export"}


def _folder(room: str) -> Path:
    return ROOT / room if room in ("export", "cli") else ROOT / "m2mkd" / room


def _sources() -> Iterator[tuple[str, Path]]:
    """Yields every source file with its room; the modules of m2mkd itself have the room ""."""
    for room in ARROWS:
        for path in sorted(_folder(room).rglob("*.py")):
            yield room, path
    for path in sorted((ROOT / "m2mkd").glob("*.py")):
        yield "", path


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of each import; `from m2mkd import x` counts as `m2mkd.x`.

    A relative import is given with its leading dots.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"m2mkd.{a.name}" for a in node.names] if module == "m2mkd" else [module]
            for name in names:
                yield node.lineno, name


def _where(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_every_room_has_sources_to_check() -> None:
    assert {room for room, _ in _sources()} == {*ARROWS, ""}


def test_no_folder_of_the_package_is_missing_from_the_arrows() -> None:
    folders = {path.parent.name for path in (ROOT / "m2mkd").glob("*/__init__.py")}
    assert folders <= set(ARROWS) | {"recipes"}


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    allowed = ARROWS[room] | ANYWHERE | {room}
    if room in ("ops", "export"):
        allowed = allowed | {"_C"}
    wrong = [
        _where(path, line, name)
        for path in sorted(_folder(room).rglob("*.py"))
        for line, name in _imports(path)
        if name.startswith("m2mkd.") and name.split(".")[1] not in allowed
    ]
    assert not wrong


def test_modules_that_may_be_imported_anywhere_import_no_room() -> None:
    wrong = [
        _where(path, line, name)
        for path in sorted((ROOT / "m2mkd").glob("*.py"))
        for line, name in _imports(path)
        if name.startswith("m2mkd.") and name.split(".")[1] in ARROWS
    ]
    assert not wrong


@pytest.mark.parametrize("library", FENCED)
def test_a_fenced_library_stays_in_its_room(library: str) -> None:
    wrong = [
        _where(path, line, name)
        for room, path in _sources()
        for line, name in _imports(path)
        if name.split(".")[0] == library and room != FENCED[library]
    ]
    assert not wrong


def test_imports_are_absolute_and_spelled_m2mkd() -> None:
    wrong = [
        _where(path, line, name)
        for _, path in _sources()
        for line, name in _imports(path)
        if name.split(".")[0] in ("", "export", "cli")
    ]
    assert not wrong
