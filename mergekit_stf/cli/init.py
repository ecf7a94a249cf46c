"""``mergekit-stf init``: a commented recipe from a base and models, with what ``plan`` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import write_text
from mergekit_stf.host.recipe.draft import commented
from mergekit_stf.host.run.init import Draft, draft_recipe


@click.command("init")
@click.argument("base", metavar="BASE")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.yml"),
    show_default=True,
    help="The recipe to write.",
)
@click.option(
    "--method",
    type=click.Choice(methods.names()),
    default=methods.RECOMMENDED,
    show_default=True,
    help="The merge method.",
)
@click.option("--force", is_flag=True, help="Replace the recipe if it is there.")
def command(base: str, models: tuple[str, ...], out: Path, method: str, force: bool) -> None:
    """Write a commented recipe that merges each MODEL into BASE, and say what plan says.

    BASE and MODEL are directories, or names of hub models that are in the cache on this machine.
    A MODEL may be a LoRA adapter. Nothing is written if the models cannot be merged.

    \b
    Examples:
      mergekit-stf init base math code
      mergekit-stf init meta-llama/Llama-2-7b-hf adapters/math adapters/code -o adapters.yml
    """
    if out.exists() and not force:
        raise STFError(f"{out} is there already; give another --out, or --force to replace it")
    found = draft_recipe(base, models, method, str(out))
    steps = list(_steps(out, found))
    write_text(out, commented(_head(found, models, base, steps)) + found.text + _planned(found))
    for warning in found.warnings:
        echo(f"Warning: {warning}", err=True)
    for line in (*found.plan.figures(), "", f"{out}: written", *steps):
        echo(line)


def _head(found: Draft, models: tuple[str, ...], base: str, steps: list[str]) -> Iterator[str]:
    yield f"Merges {len(models)} {'adapters' if found.adapters else 'models'} into {base}."
    yield "A path is seen from the folder in which a command runs. Change what you like."
    yield from steps


def _steps(out: Path, found: Draft) -> Iterator[str]:
    yield "Next:"
    yield f"  mergekit-stf plan {out}"
    yield f"  mergekit-stf {'lora' if found.adapters else 'merge'} {out} merged"


def _planned(found: Draft) -> str:
    warnings = (f"Warning: {warning}" for warning in found.warnings)
    return "\n" + commented(["What plan said of it:", *warnings, *found.plan.figures()])
