"""``mergekit-stf compare``: one recipe merged by several methods, ours and the host's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from mergekit_stf.cli.common.out_folder import OutFolder
from mergekit_stf.cli.common.points import (
    Grid,
    Work,
    add_grid_options,
    merge_points,
    print_warnings,
)
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.host.outputs.out_folder import out_folder
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.recipe.grid import method_points
from mergekit_stf.host.recipe.recast import Recast
from mergekit_stf.host.recipe.recipe import load_recipe


def parse_names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Return the names of a list with commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    if not all(names):
        raise click.BadParameter(f"{value!r} is no list of methods such as wudi,stf,ties")
    return names


@click.command("compare", cls=PrettyPrintHelp)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=OutFolder())
@click.option(
    "--methods",
    required=True,
    callback=parse_names,
    metavar="NAMES",
    help="Merge methods, ours and mergekit's own, e.g. wudi,stf,tsv_m,ties,linear.",
)
@click.option(
    "--defaults",
    is_flag=True,
    help="Each method has its own defaults; the recipe's weight, rule and split stay.",
)
@add_grid_options
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    methods: tuple[str, ...],
    defaults: bool,
    grid: Grid,
) -> None:
    """Merge CONFIG once by every method, into one folder each under OUT.

    Each folder is what mergekit-stf merge makes of the recipe with the other word after
    merge_method: what the recipe sets holds for every method that has a parameter of that name,
    what a method does not know is left out, which is said, and what the recipe leaves open has the
    method's own default. With --lambda and the like every method that knows the parameter is merged
    for every value. A point that is there already is not merged again.

    \b
    Examples:
      mergekit-stf compare config.yml out/ --methods wudi,stf,tsv_m,ties \\
          --eval "python score.py {out}"
      mergekit-stf compare config.yml out/ --methods wudi,ties,linear --defaults \\
          --lambda 0.6:1.4:0.2
    """
    recipe = load_recipe(config_file)
    merge_options.apply_global_options()
    points, recasts = method_points(recipe, methods, grid.values, defaults)
    print_warnings(recipe, grid.values)
    _print_dropped(recasts)
    out_folder(out)  # is refused now or never
    merge_points(points, Work("compare", out, merge_options, grid))


def _print_dropped(recasts: Mapping[str, Recast]) -> None:
    """Say what of the recipe a method is merged without."""
    for name, found in recasts.items():
        without = [*found.dropped, *(["base_model"] if found.without_base else [])]
        if without:
            echo(f"{name} is merged without the recipe's {', '.join(without)}", err=True)
