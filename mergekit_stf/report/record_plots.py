"""Figures of what the merge recorded: interference, spectra, corrections, time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mergekit_stf.core.features import spectrum_ranks
from mergekit_stf.host.diagnostics.records import Record
from mergekit_stf.host.diagnostics.sample import layer_and_kind
from mergekit_stf.report.canvas import MANY_KINDS, MARKERS, Plot, draw, logarithmic
from mergekit_stf.report.facts import Report, mean_cosine, without_common_start


def draw_heat_map(report: Report) -> Plot:
    """Draw the mean cosine of each pair of models."""
    cosine = mean_cosine(report.comparable)
    pairs = combinations(range(len(report.labels)), 2)
    i, j = max(pairs, key=lambda pair: abs(cosine[pair[0]][pair[1]]))
    return draw(
        "interference",
        "Interference between tasks",
        f"Mean cosine of each pair of task matrices; the strongest is {cosine[i][j]:.3f}, "
        f"between {report.labels[i]} and {report.labels[j]}.",
        lambda axes, _: _paint_heat(axes, cosine, report.labels),
        (4.8, 4.2),
    )


def _paint_heat(axes: Axes, cosine: list[list[float]], labels: Sequence[str]) -> None:
    image = axes.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1)
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)
    if len(labels) <= 8:
        for i in ticks:
            for j in ticks:
                dark = abs(cosine[i][j]) > 0.6
                axes.text(
                    j, i, f"{cosine[i][j]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip


def draw_spectra(records: Sequence[Record]) -> Plot:
    """Draw the median spectrum of each kind of weight."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(layer_and_kind(record.name)[1], []).append(record)
    curves = {kind: _median_spectrum(records) for kind, records in kinds.items()}
    names = without_common_start(list(curves))
    return draw(
        "spectra",
        "Singular values of the task matrices",
        f"Singular values over the largest, median over layers and tasks, for {len(curves)} kinds "
        "of weight: a steep curve means that few features carry the change.",
        lambda axes, colours: _paint_spectra(axes, colours, names, list(curves.values())),
        (4.8, 3.6),
    )


def _median_spectrum(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Return ranks of the median task and, at the same steps, the median of s over the largest."""
    spectra = [
        [value / spectrum[0] for value in spectrum]
        for record in records
        for spectrum in record.spectra
        if spectrum
    ]
    kept = [count for record in records for count in record.kept if count]
    if not spectra:
        return [], []
    medians = [statistics.median(step) for step in zip(*spectra, strict=True)]
    return spectrum_ranks(round(statistics.median(kept))), medians


def _paint_spectra(
    axes: Axes,
    colours: Sequence[str],
    names: Sequence[str],
    curves: Sequence[tuple[list[int], list[float]]],
) -> None:
    for index, (name, (ranks, values)) in enumerate(zip(names, curves, strict=True)):
        style = ("-", "--", ":", "-.")[index // len(colours) % 4]
        axes.plot(ranks, values, style, color=colours[index % len(colours)], label=name)
    logarithmic(axes, "x", "y")
    axes.set_xlabel("rank")
    axes.set_ylabel("s / largest s")
    if len(names) <= MANY_KINDS:
        axes.legend(fontsize=7, frameon=False)


def draw_alpha(records: Sequence[Record]) -> Plot:
    """Draw how far each weight's features were corrected."""
    low = min(record.alpha_ratio[0] for record in records)
    high = max(record.alpha_ratio[-1] for record in records)
    return draw(
        "alpha",
        "α/s by weight",
        f"The correction of each feature runs from {low:.2f} to {high:.2f}; "
        "1 is what task arithmetic does.",
        lambda axes, colours: _paint_alpha(axes, colours, records),
    )


def _paint_alpha(axes: Axes, colours: Sequence[str], records: Sequence[Record]) -> None:
    steps = range(len(records))
    least, low, median, high, most = zip(*(r.alpha_ratio for r in records), strict=True)
    axes.fill_between(steps, least, most, color=colours[0], alpha=0.2, lw=0, label="all")
    axes.fill_between(steps, low, high, color=colours[0], alpha=0.4, lw=0, label="half")
    axes.plot(steps, median, color=colours[0], label="median")
    # The smallest features have no bound on α/s and would flatten all others.
    margin = 1.5 * max(0.1, max(high) - min(low))
    axes.set_ylim(min(low) - margin, max(high) + margin)
    axes.axhline(1, color=colours[1], lw=1, ls="--", label="task arithmetic")
    _count_weights(axes)
    axes.set_ylabel("α / s")
    axes.legend(fontsize=7, frameon=False)


def draw_seconds(records: Sequence[Record]) -> Plot:
    """Draw the time that each weight took."""
    rules = sorted({record.rule for record in records})
    total = sum(record.seconds for record in records)
    slowest = max(records, key=lambda record: record.seconds)
    return draw(
        "seconds",
        "Time by weight",
        f"{total:.3g} s over {len(records)} weights; the slowest is {slowest.name} "
        f"with {slowest.seconds:.3g} s.",
        lambda axes, colours: _paint_seconds(axes, colours, records, rules),
    )


def _paint_seconds(
    axes: Axes, colours: Sequence[str], records: Sequence[Record], rules: Sequence[str]
) -> None:
    for rule, colour, marker in zip(rules, colours, MARKERS, strict=False):
        points = [(k, r.seconds) for k, r in enumerate(records) if r.rule == rule and r.seconds]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=rule)
    logarithmic(axes, "y")
    _count_weights(axes)
    axes.set_ylabel("seconds")
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def draw_memory(records: Sequence[Record]) -> Iterator[Plot]:
    """Yield the plot of the memory that the merge took, where it is known."""
    series = {
        "process": [record.peak_rss or 0 for record in records],
        "accelerator": [record.peak_device or 0 for record in records],
    }
    known = {name: values for name, values in series.items() if any(values)}
    if known:
        ends = ", ".join(f"{name} {max(v) / 1e9:.2f} GB" for name, v in known.items())
        yield draw(
            "memory",
            "Memory high-water mark",
            f"Peak memory: {ends}.",
            lambda axes, colours: _paint_memory(axes, colours, known),
        )


def _paint_memory(axes: Axes, colours: Sequence[str], series: dict[str, list[int]]) -> None:
    for (name, values), colour in zip(series.items(), colours, strict=False):
        axes.step(range(len(values)), [value / 1e9 for value in values], color=colour, label=name)
    axes.set_ylim(bottom=0)
    _count_weights(axes)
    axes.set_ylabel("GB")
    axes.legend(fontsize=7, frameon=False)


def _count_weights(axes: Axes) -> None:
    axes.set_xlabel("weight, in the order of the merge")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
