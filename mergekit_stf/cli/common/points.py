"""What ``sweep`` and ``compare`` share: their options, and the way from points to the best one."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from mergekit_stf.cli.common.errors import Terminated
from mergekit_stf.cli.common.ray_option import add_ray_option, open_executor
from mergekit_stf.cli.common.store_options import add_store_options
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.executors.execution import Executor
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.provenance.digests import Known
from mergekit_stf.host.recipe.grid import (
    Point,
    Value,
    find_overrides,
    parse_options,
    parse_values,
)
from mergekit_stf.host.recipe.recipe import Recipe
from mergekit_stf.host.run.merge import StoreOptions
from mergekit_stf.host.run.signals import add_note
from mergekit_stf.host.store.store import Store
from mergekit_stf.sweep.evaluate import Evaluation, evaluate
from mergekit_stf.sweep.point import merge_point
from mergekit_stf.sweep.table import Row, format_lines, write_best, write_table

F = TypeVar("F", bound=Callable[..., Any])
Values = dict[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Grid:
    """What the options of a grid say.

    Attributes:
        values: of each parameter that is varied.
        evaluation: how to score a point, None to leave that.
        force: merge again what is not as it should be.
        store_size: most bytes of the store.
        keep_store: leave the store for another run.
        ray_address: of the cluster that merges, None for this process.
    """

    values: Values
    evaluation: Evaluation | None
    force: bool
    store_size: int
    keep_store: bool
    ray_address: str | None


@dataclass(frozen=True)
class Work:
    """How points are merged and scored.

    Attributes:
        name: of the table and the plot.
        out: the folder that gets them, and a folder for each point.
        options: the host's.
        grid: the command line's.
    """

    name: str
    out: Path
    options: MergeOptions
    grid: Grid


def parse_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Return the numbers of a list, or of a range with its last value and its step."""
    try:
        return None if value is None else parse_values(value)
    except STFError as error:
        raise click.BadParameter(str(error)) from error


def parse_vary(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> Values:
    """Return the values of each ``NAME=VALUES``."""
    found: Values = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not (name.strip() and equals):
            raise click.BadParameter(f"{text!r} is not NAME=VALUES, such as ridge=0.1,0.3")
        try:
            found[name.strip()] = parse_options(values)
        except STFError as error:
            raise click.BadParameter(str(error)) from error
    return found


def add_grid_options(command: F) -> F:
    """Add the options of a grid, of its evaluation and of the store; they arrive as ``grid``."""

    @functools.wraps(command)
    def with_grid(
        *args: Any,
        lambdas: tuple[float, ...] | None,
        density: tuple[float, ...] | None,
        rank: tuple[float, ...] | None,
        vary: Values,
        command_line: str | None,
        lower_is_better: bool,
        **given: Any,
    ) -> Any:
        values = gather_values({"lambda": lambdas, "density": density, "rank": rank}, vary)
        evaluation = Evaluation(command_line, lower_is_better) if command_line else None
        own = {one.name: given.pop(one.name) for one in fields(Grid) if one.name in given}
        return command(*args, grid=Grid(values, evaluation, **own), **given)

    numbers: dict[str, Any] = {"callback": parse_numbers, "metavar": "VALUES"}
    options = (
        click.option("--lambda", "lambdas", **numbers, help="Values of lambda, e.g. 0.4:1.2:0.1."),
        click.option(
            "--density", **numbers, help="Values of density for every model, e.g. 0.1,0.2."
        ),
        click.option("--rank", **numbers, help="Values of rank, e.g. 0.2,1."),
        click.option(
            "--vary",
            multiple=True,
            callback=parse_vary,
            metavar="NAME=VALUES",
            help="Values of any other parameter, e.g. ridge=0.1,0.3 or prior=matched,sum.",
        ),
        click.option(
            "--eval",
            "command_line",
            metavar="COMMAND",
            help="Run this on every point; {out} becomes its folder. The last line that it prints "
            "must end with a number.",
        ),
        click.option(
            "--lower-is-better", is_flag=True, help="The number is a loss.  [default: a score]"
        ),
        click.option(
            "--force", is_flag=True, help="Merge points again that are not as they should be."
        ),
        add_store_options,
        add_ray_option,
    )
    found = with_grid
    for option in reversed(options):
        found = option(found)
    return cast("F", found)


def gather_values(given: Mapping[str, tuple[float, ...] | None], vary: Values) -> Values:
    """Return the values of every parameter that the command line varies.

    Args:
        given: by options of their own.
        vary: by ``--vary``.

    Raises:
        click.UsageError: ``--vary`` names a parameter that has an option of its own.
    """
    found: Values = {name: values for name, values in given.items() if values is not None}
    if twice := sorted(set(found) & set(vary)):
        raise click.UsageError(f"{twice[0]} is given twice, by --{twice[0]} and by --vary")
    return found | vary


def print_warnings(recipe: Recipe, values: Values) -> None:
    """Say what is suspicious about a recipe, and what of it the grid replaces."""
    for warning in recipe.warnings:
        echo(f"Warning: {recipe.source}: {warning}", err=True)
    for name in find_overrides(recipe, list(values)):
        echo(f"Warning: {name} of single models or layers is replaced by the sweep", err=True)


def merge_points(points: Sequence[Point], work: Work) -> None:
    """Merge and score every point, and write the table, the plot and the best recipe."""
    with open_executor(work.grid.ray_address, work.options) as executor:
        rows = _rows(points, work, executor)
    if not work.grid.keep_store:
        Store(work.out / ".store").clear()
    _finish(rows, work)


def _rows(points: Sequence[Point], work: Work, executor: Executor | None) -> list[Row]:
    rows: list[Row] = []
    known: Known = {}
    store = StoreOptions(work.out / ".store", work.grid.store_size)
    try:
        for point in points:
            started, folder = time.perf_counter(), work.out / point.name
            state = merge_point(
                point, folder, work.options, store, known, work.grid.force, executor
            )
            seconds = time.perf_counter() - started
            rows.append(_row(point, folder, work.grid.evaluation))
            if not work.options.quiet:
                scored = f", score {rows[-1].score:g}" if work.grid.evaluation else ""
                took = f" in {seconds:.1f} s" if state.startswith("merged") else ""
                echo(f"[{len(rows)}/{len(points)}] {folder} {state}{took}{scored}")
    except (KeyboardInterrupt, Terminated) as error:
        add_note(
            error,
            f"{len(rows)} of {len(points)} points are finished in {work.out}; "
            "run the same command again to go on from here.",
        )
        raise
    return rows


def _row(point: Point, folder: Path, evaluation: Evaluation | None) -> Row:
    return Row(point, folder, evaluate(evaluation, folder)) if evaluation else Row(point, folder)


def _finish(rows: Sequence[Row], work: Work) -> None:
    echo(f"{write_table(rows, work.out / f'{work.name}.csv')}: {len(rows)} points")
    if work.grid.evaluation is None:
        return
    for line in format_lines(rows):
        echo(line)
    if importlib.util.find_spec("matplotlib") is None:
        echo("no plot: pip install 'mergekit-stf[report]'")
    else:
        from mergekit_stf.sweep.plot import write_plot

        echo(f"{write_plot(rows, work.out / f'{work.name}.png')}: the scores as a plot")
    echo(f"{write_best(rows, work.out, work.grid.evaluation.lower_is_better)}: the best recipe")
