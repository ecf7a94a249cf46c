"""Figure 3(b): the best ``lambda`` as the number of merged tasks grows.

For each number of tasks, the mean over three sets of kinds, measured on the validation split.
"""

from __future__ import annotations

from typing import Any

from benchmarks.paper.common import Study, change, main

SETS = 3
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)


def measure(study: Study) -> list[dict[str, Any]]:
    points = []
    for count in range(2, len(study.kinds) + 1):
        for kinds in sets_of_kinds(study.kinds, count):
            merged = change(study, "stf", kinds=kinds)
            for scale in SCALES:
                score = study.score(merged.at(scale), kinds, "validation")
                points.append({"tasks": count, "kinds": kinds, "lambda": scale, **score})
    return points


def sets_of_kinds(kinds: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """Return ``SETS`` runs of neighbours in the circle of kinds, and one set if all are taken."""
    if count == len(kinds):
        return [kinds]
    starts = range(0, len(kinds), len(kinds) // SETS)
    return [tuple(kinds[(start + i) % len(kinds)] for i in range(count)) for start in starts]


if __name__ == "__main__":
    main("tasks", measure)
