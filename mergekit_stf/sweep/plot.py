"""The plot of a sweep or a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from mergekit_stf.host.recipe.grid import METHOD, Value, format_value
from mergekit_stf.report.canvas import MARKERS, SIZE, Draw, draw
from mergekit_stf.sweep.table import Row, column_names

BAR = 0.28
"""Inches of height for each bar, where there are many."""


def write_plot(rows: Sequence[Row], path: Path) -> Path:
    """Draw the scores: over the numbers that vary fastest, or as bars where no number varies.

    Each set of the other values is a line; a method that lacks the parameter is a level.

    Args:
        rows: evaluated points.
        path: the PNG to write.
    """
    over = _over(rows)
    height = SIZE[1] if over else max(SIZE[1], BAR * len(rows))
    paint = _lines(rows, over) if over else _bars(rows)
    path.write_bytes(draw(path.stem, "Score", "", paint, (SIZE[0], height)).light)
    return path


def _over(rows: Sequence[Row]) -> str:
    """Return the last parameter that has several values, all numbers; nothing where none has."""
    for name in reversed(column_names(rows)):
        found = {row.point.values[name] for row in rows if name in row.point.values}
        if len(found) > 1 and all(isinstance(value, float) for value in found):
            return name
    return ""


def _lines(rows: Sequence[Row], over: str) -> Draw:
    series: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    for row in rows:
        label = _label(row.point.values, over)
        if isinstance(value := row.point.values.get(over), float):
            series.setdefault(label, []).append((value, row.score))
        else:
            levels[label] = row.score

    def paint(axes: Axes, colours: Sequence[str]) -> None:
        for index, (label, points) in enumerate(series.items()):
            values, scores = zip(*sorted(points), strict=True)
            marker, colour = MARKERS[index % len(MARKERS)], colours[index % len(colours)]
            axes.plot(values, scores, marker=marker, color=colour, label=label)
        for index, (label, score) in enumerate(levels.items(), len(series)):
            colour = colours[index % len(colours)]
            axes.axhline(score, linestyle="--", color=colour, label=label)
        axes.set_xlabel(over)
        axes.set_ylabel("score")
        if len(series) + len(levels) > 1:
            axes.legend(fontsize=7, frameon=False)

    return paint


def _bars(rows: Sequence[Row]) -> Draw:
    labels, scores = [_label(row.point.values) for row in rows], [row.score for row in rows]

    def paint(axes: Axes, colours: Sequence[str]) -> None:
        axes.barh(range(len(rows)), scores, tick_label=labels, color=colours[0])
        axes.invert_yaxis()
        axes.set_xlabel("score")

    return paint


def _label(values: Mapping[str, Value], without: str = "") -> str:
    return ", ".join(
        format_value(value) if name == METHOD else f"{name} {format_value(value)}"
        for name, value in values.items()
        if name != without
    )
