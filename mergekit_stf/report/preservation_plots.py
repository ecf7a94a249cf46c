"""Figures of the preservation error, as in the paper's Figures 1a and 4."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mergekit_stf.host.diagnostics.preservation import Preservation
from mergekit_stf.host.diagnostics.sample import layer_and_kind
from mergekit_stf.report.canvas import MANY_KINDS, MARKERS, Plot, draw, logarithmic
from mergekit_stf.report.facts import without_common_start


def by_kind(measured: Sequence[Preservation]) -> dict[str, list[Preservation]]:
    """Group weights by kind, named without what all kinds' names start with."""
    kinds: dict[str, list[Preservation]] = {}
    for item in measured:
        kinds.setdefault(layer_and_kind(item.name)[1], []).append(item)
    return dict(zip(without_common_start(list(kinds)), kinds.values(), strict=True))


def methods_of(measured: Sequence[Preservation]) -> list[str]:
    """Return the measured methods, the recipe's first, what was stored last."""
    return list(measured[0].error)


def draw_preservation(measured: Sequence[Preservation]) -> Iterator[Plot]:
    """Yield the plots of what was measured of preservation, none where nothing was."""
    if not measured:
        return
    methods = methods_of(measured)
    means = {m: statistics.fmean(item.error[m] for item in measured) for m in methods}
    yield draw(
        "preservation",
        "All measured weights",
        "Mean preservation error: " + ", ".join(f"{m} {means[m]:.2g}" for m in methods) + ".",
        lambda axes, colours: _dots(axes, colours, means),
    )
    for number, (kind, items) in enumerate(list(by_kind(measured).items())[:MANY_KINDS], start=1):
        yield draw(
            f"preservation-{number:02d}",
            kind,
            f"Preservation error of {kind} by layer, from "
            f"{min(i.error[i.method] for i in items):.1e} for {items[0].method} up to "
            f"{max(max(i.error.values()) for i in items):.1e} over all methods.",
            partial(_layers, items=items, methods=methods),
        )


def _dots(axes: Axes, colours: Sequence[str], means: dict[str, float]) -> None:
    """One row a method, on a logarithmic axis: what is zero, or undefined, has no dot."""
    for row, (value, colour, marker) in enumerate(
        zip(means.values(), colours, MARKERS, strict=False)
    ):
        if value > 0 and math.isfinite(value):
            axes.plot([value], [row], marker=marker, color=colour, markersize=8)
            axes.annotate(f"{value:.1e}", (value, row), (0, 8), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
    logarithmic(axes, "x")
    axes.margins(x=0.2, y=0.25)
    axes.set_yticks(range(len(means)), list(means))
    axes.invert_yaxis()
    axes.set_xlabel("mean |⟨σu, M̄v − σu⟩|")


def _layers(
    axes: Axes, colours: Sequence[str], items: Sequence[Preservation], methods: Sequence[str]
) -> None:
    layers = [layer_and_kind(item.name)[0] or 0 for item in items]
    order = sorted(range(len(items)), key=layers.__getitem__)
    for method, colour, marker in zip(methods, colours, MARKERS, strict=False):
        axes.plot(
            [layers[k] for k in order],
            [items[k].error[method] or math.nan for k in order],
            color=colour,
            marker=marker,
            markersize=4,
            label=method,
        )
    logarithmic(axes, "y")
    axes.set_xlabel("layer")
    axes.set_ylabel("error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
