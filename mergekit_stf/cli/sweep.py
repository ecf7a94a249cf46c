"""``mergekit-stf sweep``: one ordinary merge for every value, the decompositions done once."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import click

from mergekit_stf.cli.common.errors import Terminated
from mergekit_stf.cli.common.out_folder import OutFolder
from mergekit_stf.cli.common.store_options import add_store_options
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.outputs.out_folder import out_folder
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.provenance.digests import Known
from mergekit_stf.host.recipe.grid import Point, find_overrides, grid_points, parse_values
from mergekit_stf.host.recipe.recipe import load_recipe
from mergekit_stf.host.run.merge import StoreOptions
from mergekit_stf.host.run.signals import add_note
from mergekit_stf.host.store.store import Store
from mergekit_stf.sweep.evaluate import Evaluation, evaluate
from mergekit_stf.sweep.point import merge_point
from mergekit_stf.sweep.table import Row, format_lines, write_best, write_table


def values_of(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Return the numbers of a list, or of a range with its last value and its step."""
    try:
        return None if value is None else parse_values(value)
    except STFError as error:
        raise click.BadParameter(str(error)) from error


@click.command("sweep", cls=PrettyPrintHelp)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=OutFolder())
@click.option(
    "--lambda",
    "lambdas",
    callback=values_of,
    metavar="VALUES",
    help="Values of lambda, e.g. 0.4:1.2:0.1.",
)
@click.option(
    "--density",
    callback=values_of,
    metavar="VALUES",
    help="Values of density for every model, e.g. 0.1,0.2.",
)
@click.option("--rank", callback=values_of, metavar="VALUES", help="Values of rank, e.g. 0.2,1.")
@click.option(
    "--eval",
    "command_line",
    metavar="COMMAND",
    help="Run this on every point; {out} becomes its folder. The last line that it prints must "
    "end with a number.",
)
@click.option("--lower-is-better", is_flag=True, help="The number is a loss.  [default: a score]")
@add_store_options
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    lambdas: tuple[float, ...] | None,
    density: tuple[float, ...] | None,
    rank: tuple[float, ...] | None,
    command_line: str | None,
    lower_is_better: bool,
    keep_store: bool,
    store_size: int,
) -> None:
    """Merge CONFIG once for every value of a grid, into one folder each under OUT.

    Each folder is what mergekit-stf merge makes of the recipe with that value, byte for
    byte. The merged matrix does not depend on lambda, so a sweep over lambda decomposes once;
    one over density or rank decomposes once for each of these. A point that is there already is
    not merged again, so that an interrupted sweep goes on where it was.

    \b
    Examples:
      mergekit-stf sweep config.yml out/ --lambda 0.4:1.2:0.1
      mergekit-stf sweep config.yml out/ --lambda 0.6,0.8,1 --density 0.1,0.2,1 \\
          --eval "python score.py {out}"
    """
    given = {"lambda": lambdas, "density": density, "rank": rank}
    values = {name: numbers for name, numbers in given.items() if numbers is not None}
    if not values:
        raise click.UsageError("give at least one of --lambda, --density and --rank")
    recipe = load_recipe(config_file)
    merge_options.apply_global_options()
    for warning in recipe.warnings:
        echo(f"Warning: {recipe.source}: {warning}", err=True)
    for name in find_overrides(recipe, list(values)):
        echo(f"Warning: {name} of single models or layers is replaced by the sweep", err=True)
    out_folder(out)  # is refused now or never
    store = StoreOptions(out / ".store", store_size)
    evaluation = Evaluation(command_line, lower_is_better) if command_line else None
    rows = _sweep(grid_points(recipe, values), out, merge_options, store, evaluation)
    if not keep_store:
        Store(out / ".store").clear()
    _finish(rows, out, evaluation)


def _sweep(
    grid: Sequence[Point],
    out: Path,
    options: MergeOptions,
    store: StoreOptions,
    evaluation: Evaluation | None,
) -> list[Row]:
    rows: list[Row] = []
    known: Known = {}
    try:
        for point in grid:
            started = time.perf_counter()
            state = merge_point(point, out / point.name, options, store, known)
            seconds = time.perf_counter() - started
            rows.append(_row(point, out / point.name, evaluation))
            if not options.quiet:
                scored = f", score {rows[-1].score:g}" if evaluation else ""
                took = f" in {seconds:.1f} s" if state == "merged" else ""
                echo(f"[{len(rows)}/{len(grid)}] {rows[-1].folder} {state}{took}{scored}")
    except (KeyboardInterrupt, Terminated) as error:
        add_note(
            error,
            f"{len(rows)} of {len(grid)} points are finished in {out}; "
            "run the same command again to go on from here.",
        )
        raise
    return rows


def _row(point: Point, folder: Path, evaluation: Evaluation | None) -> Row:
    return Row(point, folder, evaluate(evaluation, folder)) if evaluation else Row(point, folder)


def _finish(rows: Sequence[Row], out: Path, evaluation: Evaluation | None) -> None:
    echo(f"{write_table(rows, out)}: {len(rows)} points")
    if evaluation is None:
        return
    for line in format_lines(rows):
        echo(line)
    if importlib.util.find_spec("matplotlib") is None:
        echo("no plot: pip install 'mergekit-stf[report]'")
    else:
        from mergekit_stf.sweep.plot import write_plot

        echo(f"{write_plot(rows, out)}: the scores as a plot")
    echo(f"{write_best(rows, out, evaluation.lower_is_better)}: the best recipe")
