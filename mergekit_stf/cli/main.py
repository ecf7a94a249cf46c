"""The command ``mergekit-stf``: one lazily imported module for each subcommand."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import click
from click.shell_completion import CompletionItem

from mergekit_stf import __version__
from mergekit_stf.cli.common.errors import end_at_once, report_errors
from mergekit_stf.cli.common.terminal import echo, escape_streams

COMMANDS = {
    "demo": "Train a tiny base and its specialists, merge them, and print what each merge does.",
    "init": "Write a commented recipe from a base and models, with what plan says about it.",
    "plan": "Check a recipe and estimate time and memory, without reading weights.",
    "merge": "Merge like mergekit-yaml, with checks first, resume after a crash, and a lock file.",
    "sweep": "Merge once, write one model for every value of lambda, density or another parameter.",
    "compare": "Merge one recipe by several methods, and find the best one by a command of yours.",
    "lora": "Merge LoRA adapters from their factors, without full copies.",
    "verify": "Check a merge against its lock file.",
    "report": "Write one HTML file that shows what a merge did.",
    "doctor": "Say what is installed, what mergekit knows of it, and which route the engine takes.",
}

FIRST_STEPS = """\
mergekit-stf merges models that were tuned from one base. What to do next:

  mergekit-stf demo                     see it work: tiny models, trained and merged here
  mergekit-stf init BASE MODEL MODEL    write a recipe for your own models or adapters
  mergekit-stf plan recipe.yml          check it; time, memory and disk that it takes
  mergekit-stf merge recipe.yml merged  merge it
  mergekit-stf doctor                   if something does not work

`mergekit-stf --help` lists all commands, `mergekit-stf COMMAND --help` explains one."""


class LazyGroup(click.Group):
    """A group that imports ``mergekit_stf.cli.<name>`` only when ``<name>`` is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one subcommand and return its ``command``."""
        if cmd_name not in COMMANDS:
            return None
        with end_at_once():
            module = importlib.import_module(f"mergekit_stf.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand, or name the one that was probably meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0].lower(), COMMANDS, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command {args[0]!r}; {known}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of subcommands without importing them."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; nothing that it says obeys a control character of a file."""
        with escape_streams():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; whatever it raises ends in one message and an exit code."""
        with report_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, invoke_without_command=True)
@click.version_option(__version__, prog_name="mergekit-stf")
@click.pass_context
def main(context: click.Context) -> None:
    """Merge models that were tuned from one base, with the merge methods of this package."""
    if context.invoked_subcommand is None:
        for line in FIRST_STEPS.splitlines():
            echo(line)
