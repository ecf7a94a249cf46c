"""``mergekit-stf sweep``: one ordinary merge for every value, the decompositions done once."""

from __future__ import annotations

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
from mergekit_stf.host.outputs.out_folder import out_folder
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.recipe.grid import grid_points
from mergekit_stf.host.recipe.recipe import load_recipe


@click.command("sweep", cls=PrettyPrintHelp)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=OutFolder())
@add_grid_options
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    grid: Grid,
) -> None:
    """Merge CONFIG once for every value of a grid, into one folder each under OUT.

    Each folder is what mergekit-stf merge makes of the recipe with that value, byte for
    byte. The merged matrix does not depend on lambda, so a sweep over lambda decomposes once;
    one over density or another parameter decomposes once for each of its values. A point that is
    there already is not merged again, so that an interrupted sweep goes on where it was.

    \b
    Examples:
      mergekit-stf sweep config.yml out/ --lambda 0.4:1.2:0.1
      mergekit-stf sweep config.yml out/ --lambda 0.6,0.8,1 --density 0.1,0.2,1 \\
          --eval "python score.py {out}"
      mergekit-stf sweep config.yml out/ --vary ridge=0.1,0.3,1 --vary prior=matched,sum
    """
    if not grid.values:
        raise click.UsageError("give at least one of --lambda, --density, --rank and --vary")
    recipe = load_recipe(config_file)
    merge_options.apply_global_options()
    print_warnings(recipe, grid.values)
    out_folder(out)  # is refused now or never
    merge_points(grid_points(recipe, grid.values), Work("sweep", out, merge_options, grid))
