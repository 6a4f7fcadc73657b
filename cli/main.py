"""The `m2mkd` command group.

Subcommands are named here with their help lines and imported only when used, so that `m2mkd --help`
and `m2mkd predict` do not wait for PyTorch.
"""

import keyword
import traceback
from importlib import import_module

import click

import m2mkd
from m2mkd.errors import M2MKDError, did_you_mean

# name -> (module holding a click command of that name (`import_` for import), help line)
_COMMANDS = {
    "train": ("m2mkd.cli.train", "Train a modular student from a recipe."),
    "launch": ("m2mkd.cli.launch", "Queue a run's stages as SLURM jobs."),
    "evaluate": ("m2mkd.cli.evaluate", "Measure a run's or ONNX file's accuracy."),
    "report": ("m2mkd.cli.report", "Write one HTML page about a run or several seeds."),
    "import": ("m2mkd.cli.import_", "Convert a published checkpoint to a run."),
    "prune": ("m2mkd.cli.prune", "Remove mediators from the NAC of a run."),
    "export": ("m2mkd.cli.export", "Write a run's student as a verified ONNX file."),
    "predict": ("m2mkd.cli.predict", "Classify images with an exported ONNX file."),
    "recipes": ("m2mkd.cli.recipes", "List and show the built-in recipes."),
    "info": ("m2mkd.cli.info", "Show versions, compiled kernels and devices."),
}
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def is_verbose() -> bool:
    """Whether the running command was given `-v`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().meta.get("m2mkd.verbose"))


def _set_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().meta["m2mkd.verbose"] = True


def _verbose_option() -> click.Option:
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        help="Show tracebacks of expected errors and logs of the libraries used.",
    )


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, and reports expected errors.

    An `M2MKDError` becomes one `Error:` line and exit code 1; anything unexpected keeps its
    traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names the subcommands without importing any."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports one subcommand and gives it the option `-v`."""
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(import_module(module), name)
        if not any(parameter.name == "verbose" for parameter in command.params):
            command.params.append(_verbose_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the subcommand, with a suggestion for a misspelt one."""
        name = args[0]
        if not name.startswith("-") and name not in _COMMANDS:
            ctx.fail(
                f"no command '{name}'{did_you_mean(name, _COMMANDS)}; "
                f"commands: {', '.join(_COMMANDS)}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the subcommands from their help lines, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Runs the subcommand and turns expected failures into exit codes."""
        try:
            return super().invoke(ctx)
        except M2MKDError as error:
            if ctx.meta.get("m2mkd.verbose"):
                traceback.print_exc()
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(_EXIT_INTERRUPTED)


main = LazyGroup(
    "m2mkd",
    params=[_verbose_option()],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help="Distil vision transformers into modular students, module by module (m2mKD).\n\n"
    "Example: m2mkd train quickstart",
)
click.version_option(m2mkd.__version__, prog_name="m2mkd")(main)
