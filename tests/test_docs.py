"""Every recipe key and command-line flag is documented where its user looks."""

import re
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from pydantic import BaseModel

from m2mkd.cli.main import main
from m2mkd.recipe import Recipe, Schedule, builtin_recipes, load_recipe

ROOT = Path(__file__).parents[1]


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Documented key of every field; those of schedules are explained once, without a prefix."""
    found = []
    for name, field in section.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner or name == "end_to_end_data":  # has the keys of `data`
            found.append(prefix + name)
        elif inner[0] is not Schedule:
            found += keys(inner[0], f"{prefix}{name}.")
    return found


def test_every_recipe_key_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "recipes.md").read_text()
    wanted = keys(Recipe) + keys(Schedule)
    assert len(wanted) > 50
    assert [key for key in wanted if f"| `{key}` |" not in guide] == []


def test_the_guide_names_no_key_that_is_gone() -> None:
    guide = (ROOT / "docs" / "recipes.md").read_text()
    named = re.findall(r"^\| `([a-z0-9_.]+)` \|", guide, flags=re.MULTILINE)
    assert set(named) == set(keys(Recipe) + keys(Schedule))


def test_every_recipe_key_has_a_description() -> None:
    def bare(section: type[BaseModel]) -> list[str]:
        return [
            name
            for name, field in section.model_fields.items()
            if not field.description
            and not any(isinstance(o, type) and issubclass(o, BaseModel) for o in opts(field))
        ]

    def opts(field: Any) -> list[Any]:
        return [field.annotation, *get_args(field.annotation)]

    sections = {Recipe, Schedule}
    for field in Recipe.model_fields.values():
        sections |= {o for o in opts(field) if isinstance(o, type) and issubclass(o, BaseModel)}
    assert {s.__name__: bare(s) for s in sections if bare(s)} == {}


@pytest.mark.parametrize("name", list(builtin_recipes()))
def test_built_in_recipes_are_valid_and_say_what_they_reached(name: str) -> None:
    text = builtin_recipes()[name]
    values = yaml.safe_load(text)
    sections = [key for key in ("data", "end_to_end_data") if "root" in values.get(key, {})]
    changes = tuple(f"{key}.root=." for key in sections)
    assert load_recipe(name, changes).name == name
    header = text.split("name:")[0]
    measured = "cores" in header and "%" in header
    assert measured or "not run it" in header


def test_every_option_has_a_help_text() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None and command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"m2mkd {name} {parameter.opts}"


def test_python_in_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        small = block.replace("vmoe_small_patch16_224", "vmoe_tiny_patch16_224")
        exec(compile(small, "README.md", "exec"), {})
