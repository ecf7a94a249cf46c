"""Draw the plots of the pages on performance from the figures under benchmarks/results/epyc.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from harness import RESULTS

FIGURES = RESULTS / "epyc"
FOLDER = Path(__file__).parent.parent / "docs" / "performance"


def figures(name: str) -> dict[str, dict]:
    """Read one benchmark's figures."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def numbers(data: dict[str, dict]) -> list[tuple[float, dict]]:
    """Return the entries whose key is a number, in its order."""
    found = [
        (float(key), value) for key, value in data.items() if key.replace(".", "", 1).isdigit()
    ]
    return sorted(found, key=lambda pair: pair[0])


def scaling() -> None:
    """Time and memory over the number of models."""
    points = numbers(figures("scaling"))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    tasks = [t for t, _ in points]
    left.loglog(tasks, [p["ours"]["median"] for _, p in points], "o-", label="this package")
    rival = [(t, p["rival"]["median"]) for t, p in points if "rival" in p]
    left.loglog(*zip(*rival, strict=True), "s--", label="straightforward")
    left.loglog(
        tasks, [points[0][1]["ours"]["median"] * t / tasks[0] for t in tasks], ":", c="grey"
    )
    left.set(xlabel="models T", ylabel="seconds", title="one 512 × 512 weight; dotted: linear")
    left.legend()
    right.loglog(tasks, [p["bytes"] / 2**20 for _, p in points], "o-")
    right.set(xlabel="models T", ylabel="MiB above an idle process", title="peak memory")
    for axis in (left, right):
        axis.set_xticks(tasks, [f"{t:g}" for t in tasks])
    sizes = [2**k for k in range(5, 10)]
    right.set_yticks(sizes, list(map(str, sizes)))
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_minor_locator(plt.NullLocator())
    save(fig, "scaling")


def truncation() -> None:
    """Gain and error over rank."""
    points = numbers(figures("truncation"))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ranks = [r for r, _ in points]
    left.plot(ranks, [p["ratio"]["median"] for _, p in points], "o-")
    left.set(xlabel="rank", ylabel="times faster than exact", title="4096 × 4096, 3 models")
    right.semilogy(ranks, [p["error"] for _, p in points], "o-")
    right.axhline(1e-3, ls=":", c="grey")
    right.set(xlabel="rank", ylabel="relative error", title="against as many features in float64")
    save(fig, "truncation")


def save(fig: plt.Figure, name: str) -> None:
    """Write a plot that looks the same whenever it is drawn."""
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = name
    fig.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    scaling()
    truncation()
