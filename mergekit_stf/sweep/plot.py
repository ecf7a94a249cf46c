"""The plot of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from mergekit_stf.report.canvas import MARKERS, draw
from mergekit_stf.sweep.table import Row


def write_plot(rows: Sequence[Row], out: Path) -> Path:
    """Write ``sweep.png``: the score over the parameter that varies fastest, a line for each other.

    Args:
        rows: evaluated points.
        out: the folder of the sweep.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        *others, (name, value) = row.point.values.items()
        label = ", ".join(f"{key} {number:g}" for key, number in others)
        series.setdefault(label, []).append((value, row.score))

    def paint(axes: Axes, colours: Sequence[str]) -> None:
        for index, (label, line) in enumerate(series.items()):
            marker, colour = MARKERS[index % len(MARKERS)], colours[index % len(colours)]
            values, scores = zip(*sorted(line), strict=True)
            axes.plot(values, scores, marker=marker, color=colour, label=label)
        axes.set_xlabel(name)
        axes.set_ylabel("score")
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False)

    path = out / "sweep.png"
    path.write_bytes(draw("sweep", "Score", "", paint).light)
    return path
