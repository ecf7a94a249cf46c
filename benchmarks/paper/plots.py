"""Draw ``docs/paper/*.svg`` from ``benchmarks/results/paper-*.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.common import FIGURES, read, spread

LABELS = {
    "linear": "linear",
    "task_arithmetic": "task arithmetic",
    "trimmed_sum": "trimmed sum",
    "ties": "TIES",
    "stf": "STF",
}
KEPT = "gain of the specialists kept, %"


def curve(axes: Axes, points: dict[float, list[float]], label: str) -> None:
    """Draw mean and standard deviation over seeds (or sets of tasks) against a setting."""
    xs = sorted(points)
    centre = [spread(points[x]) for x in xs]
    axes.errorbar(
        xs,
        [100 * mean for mean, _ in centre],
        [100 * deviation for _, deviation in centre],
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )


def gathered(rows: Iterable[dict[str, Any]], key: str) -> dict[float, list[float]]:
    """Collect the shares of gain kept by one setting."""
    points: dict[float, list[float]] = {}
    for row in rows:
        points.setdefault(row[key], []).append(row["kept"])
    return points


def best_by_density(method: str) -> dict[float, list[float]]:
    """Return the share kept at each density, at its best ``lambda``, on the validation split."""
    points: dict[float, list[float]] = {}
    for seed in read("quality").values():
        for density in sorted({point["density"] for point in seed[method]["grid"]}):
            grid = [p["kept"] for p in seed[method]["grid"] if p["density"] == density]
            points.setdefault(density, []).append(max(grid))
    return points


def figure_1(axes: Axes, variant: str = "") -> None:
    quality = list(read(f"quality{variant}").values())
    for points in zip(*read(f"preservation{variant}").values(), strict=True):
        method, density = points[0]["method"], points[0]["density"]
        kept = [
            max(p["kept"] for p in seed[method]["grid"] if p["density"] == density)
            for seed in quality
        ]
        x, dx = spread([point["inputs"] for point in points])
        y, dy = spread(kept)
        label = f"{LABELS[method]}, density {density}"
        axes.errorbar(max(x, 1e-8), 100 * y, 100 * dy, dx, marker="o", capsize=2, label=label)
    axes.set(xscale="log", xlabel="preservation error / mean s²", ylabel=KEPT)


def figure_3a(axes: Axes) -> None:
    seeds = list(read("matrices").values())
    for which in ("task", "fine-tuned"):
        curve(axes, gathered((p for s in seeds for p in s[which]), "lambda"), f"{which} matrices")
    axes.set(xlabel="λ", ylabel=KEPT, ylim=(-100, 100))


def figure_3b(axes: Axes) -> None:
    rows = [row for seed in read("tasks").values() for row in seed]
    for count in sorted({row["tasks"] for row in rows}):
        curve(axes, gathered((r for r in rows if r["tasks"] == count), "lambda"), f"{count} tasks")
    axes.set(xlabel="λ", ylabel=KEPT)


def figure_3c(axes: Axes) -> None:
    rows = [point for seed in read("quality").values() for point in seed["stf"]["grid"]]
    for density in sorted({row["density"] for row in rows}):
        same = gathered((r for r in rows if r["density"] == density), "lambda")
        curve(axes, same, f"density {density}")
    axes.set(xlabel="λ", ylabel=KEPT, ylim=(-60, 60))


def by_lambda(axes: Axes, variant: str = "") -> None:
    seeds = list(read(f"quality{variant}").values())
    for method, density in (("task_arithmetic", 1.0), ("trimmed_sum", 0.2), ("ties", 0.2)):
        rows = [p for s in seeds for p in s[method]["grid"] if p["density"] == density]
        curve(axes, gathered(rows, "lambda"), f"{LABELS[method]}, density {density}")
    for density in (0.2, 1.0):
        rows = [p for s in seeds for p in s["stf"]["grid"] if p["density"] == density]
        curve(axes, gathered(rows, "lambda"), f"STF, density {density}")
    axes.set(xlabel="λ", ylabel=KEPT, ylim=(-60, 60))


def figure_3d(axes: Axes) -> None:
    for method in ("stf", "trimmed_sum", "ties"):
        curve(axes, best_by_density(method), LABELS[method])
    axes.set(xlabel="density", ylabel=f"{KEPT}, at the best λ")


def figure_5(axes: Axes) -> None:
    seeds = list(read("features").values())
    for end in ("smallest", "largest"):
        for which in ("at fixed lambda", "at own lambda"):
            points: dict[float, list[float]] = {}
            for point in (p for seed in seeds for p in seed[end]):
                points.setdefault(100 * point["dropped"], []).append(point[which]["kept"])
            curve(axes, points, f"{end}, {which.replace('lambda', 'λ')}")
    axes.set(xlabel="features dropped of each task matrix, %", ylabel=KEPT)


FIGURES_BY_NAME: dict[str, Callable[[Axes], None]] = {
    "preservation": figure_1,
    "task-matrices": figure_3a,
    "number-of-tasks": figure_3b,
    "lambda-density": figure_3c,
    "density": figure_3d,
    "features": figure_5,
    "lambda": by_lambda,
    "preservation-plain": partial(figure_1, variant="-plain"),
    "lambda-plain": partial(by_lambda, variant="-plain"),
}


def draw(name: str) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    FIGURES_BY_NAME[name](axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "mergekit-stf"
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in FIGURES_BY_NAME:
        draw(name)
