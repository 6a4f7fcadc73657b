"""`m2mkd recipes`: lists the built-in recipes, prints one, or prints the JSON schema."""

import json

import click

from m2mkd.errors import ConfigError, did_you_mean


@click.group("recipes", invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List and show the built-in recipes.

    Example: m2mkd recipes show quickstart > my.yaml
    """
    if context.invoked_subcommand is None:
        context.invoke(list_recipes, as_json=False)


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object of names and summaries.")
def list_recipes(as_json: bool) -> None:
    """List the names and first lines of the recipes.

    Example: m2mkd recipes list
    """
    from m2mkd.recipe import builtin_recipes

    summaries = {name: _summary(text) for name, text in builtin_recipes().items()}
    if as_json:
        click.echo(json.dumps(summaries, indent=1))
        return
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        click.echo(f"{name:<{width}}  {summary}")


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print one recipe as YAML, ready to be changed.

    Example: m2mkd recipes show quickstart > my.yaml
    """
    from m2mkd.recipe import builtin_recipes

    known = builtin_recipes()
    if name not in known:
        raise ConfigError(
            f"unknown recipe '{name}'{did_you_mean(name, known)}; built in: {', '.join(known)}"
        )
    click.echo(known[name], nl=False)


@recipes.command("schema")
def show_schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: m2mkd recipes schema > m2mkd.schema.json
    """
    from m2mkd.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=1))


def _summary(text: str) -> str:
    """The first line of the header comment."""
    first = text.lstrip().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
