"""What a sweep leaves besides its models: a table and the best recipe."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_stf.host.checkpoints.files import atomic_write, write_text
from mergekit_stf.host.recipe.grid import Point


@dataclass(frozen=True)
class Row:
    """A point of a sweep, its folder, and its score, NaN without an evaluation."""

    point: Point
    folder: Path
    score: float = math.nan


def write_table(rows: Sequence[Row], out: Path) -> Path:
    """Write ``sweep.csv``: the values of each point, its score, its folder."""
    path = out / "sweep.csv"
    names = list(rows[0].point.values)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*names, "score", "folder"])
        for row in rows:
            score = "" if math.isnan(row.score) else row.score
            table.writerow([*row.point.values.values(), score, row.folder])
    return path


def format_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Return the scored points as lines of a table."""
    names = list(rows[0].point.values)
    yield "".join(f"{name:>10}" for name in [*names, "score"])
    for row in rows:
        yield "".join(f"{value:>10g}" for value in [*row.point.values.values(), row.score])


def best_row(rows: Sequence[Row], lower_is_better: bool) -> Row:
    """Return the point with the best score, the first one among equals."""
    sign = 1 if lower_is_better else -1
    return min(rows, key=lambda row: sign * row.score)


def write_best(rows: Sequence[Row], out: Path, lower_is_better: bool) -> Path:
    """Write ``best.yml``, the recipe of the best point."""
    found = best_row(rows, lower_is_better)
    values = ", ".join(f"{name} {value:g}" for name, value in found.point.values.items())
    path = out / "best.yml"
    write_text(path, f"# score {found.score:g} with {values}\n{found.point.recipe.text}")
    return path
