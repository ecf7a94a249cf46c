"""What a sweep or a comparison leaves besides its models: a table and the best recipe."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_stf.host.checkpoints.files import atomic_write, write_text
from mergekit_stf.host.recipe.grid import Point, format_value

WIDTH = 10


@dataclass(frozen=True)
class Row:
    """A point, its folder, and its score, NaN without an evaluation."""

    point: Point
    folder: Path
    score: float = math.nan


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the parameters that any point has, ``lambda`` last; a method may lack some."""
    names = dict.fromkeys(name for row in rows for name in row.point.values)
    return sorted(names, key=lambda name: name == "lambda")


def write_table(rows: Sequence[Row], path: Path) -> Path:
    """Write a CSV file: the values of each point, its score, its folder."""
    names = column_names(rows)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*names, "score", "folder"])
        for row in rows:
            score = "" if math.isnan(row.score) else row.score
            table.writerow([*(row.point.values.get(name, "") for name in names), score, row.folder])
    return path


def format_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Return the scored points as lines of a table."""
    names = column_names(rows)
    cells = [[*names, "score"]]
    for row in rows:
        values = [row.point.values.get(name, "-") for name in names]
        cells.append([format_value(value) for value in (*values, row.score)])
    widths = [
        max(WIDTH, *(len(cell) + 2 for cell in column)) for column in zip(*cells, strict=True)
    ]
    for line in cells:
        yield "".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))


def best_row(rows: Sequence[Row], lower_is_better: bool) -> Row:
    """Return the point with the best score, the first one among equals."""
    sign = 1 if lower_is_better else -1
    return min(rows, key=lambda row: sign * row.score)


def write_best(rows: Sequence[Row], out: Path, lower_is_better: bool) -> Path:
    """Write ``best.yml``, the recipe of the best point."""
    found = best_row(rows, lower_is_better)
    values = ", ".join(
        f"{name} {format_value(value)}" for name, value in found.point.values.items()
    )
    path = out / "best.yml"
    write_text(path, f"# score {found.score:g} with {values}\n{found.point.recipe.text}")
    return path
