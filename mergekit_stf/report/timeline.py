"""The schedule of a merge on a cluster: when each weight was merged, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from mergekit_stf.host.diagnostics.records import Record
from mergekit_stf.report.canvas import Plot, draw

Bar = tuple[float, float]
"""When a weight was begun, in seconds after the first one, and how long it took."""


def draw_timeline(records: Sequence[Record]) -> Iterator[Plot]:
    """Yield the schedule, where a cluster has merged."""
    timed = sorted((r for r in records if r.started is not None), key=lambda r: r.started or 0.0)
    if not timed:
        return
    rows = arrange(timed)
    end = max(start + length for bars in rows.values() for start, length in bars)
    busy = sum(length for bars in rows.values() for _, length in bars) / (end * len(rows) or 1)
    nodes = {node for node, _ in rows}
    yield draw(
        "timeline",
        "Schedule",
        f"{len(timed)} weights on {len(nodes)} nodes in {end:.3g} s from the first begin to the "
        f"last end; their {len(rows)} places merged for {busy:.0%} of that time.",
        lambda axes, colours: _paint_timeline(axes, colours, rows),
    )


def arrange(timed: Sequence[Record]) -> dict[tuple[str, int], list[Bar]]:
    """Return the bars of each place of each node.

    Args:
        timed: records with a beginning, in its order.
    """
    first = timed[0].started or 0.0
    rows: dict[tuple[str, int], list[Bar]] = {}
    for record in timed:
        start, place = (record.started or 0.0) - first, 0
        while (bars := rows.setdefault((record.node, place), [])) and sum(bars[-1]) > start:
            place += 1
        bars.append((start, record.seconds))
    return dict(sorted(rows.items()))


def _paint_timeline(
    axes: Axes, colours: Sequence[str], rows: dict[tuple[str, int], list[Bar]]
) -> None:
    nodes = sorted({node for node, _ in rows})
    for height, ((node, _), bars) in enumerate(rows.items()):
        colour = colours[nodes.index(node) % len(colours)]
        axes.broken_barh(bars, (height - 0.4, 0.8), facecolors=colour, edgecolor="none")
    axes.set_yticks(range(len(rows)), [node if not place else "" for node, place in rows])
    axes.set_xlabel("seconds after the first weight was begun")
