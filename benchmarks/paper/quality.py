"""Tables 1 and 3, Figures 3(c) and 3(d): every method at its best ``lambda`` and density.

Both are chosen on the validation split; the figures are of the test split.
"""

from __future__ import annotations

from typing import Any

from benchmarks.paper.common import LAMBDAS, Study, change, main

DENSITIES = (0.1, 0.2, 0.3, 0.5, 1.0)
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "linear": ((1.0,), (1.0,)),
    "task_arithmetic": (LAMBDAS, (1.0,)),
    "trimmed_sum": (LAMBDAS, DENSITIES[:-1]),
    "ties": ((0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0), DENSITIES),
    "stf": (LAMBDAS, DENSITIES),
}


def measure(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = {"base": study.score(study.base, study.kinds, "test")}
    for kind, weights in study.tuned.items():
        found[f"{kind} specialist"] = study.score(weights, study.kinds, "test")
    for method, (lambdas, densities) in GRIDS.items():
        grid = [
            {"lambda": scale, "density": density, **study.score(weights, study.kinds, "validation")}
            for density in densities
            for change_of_base in [change(study, method, density)]
            for scale in lambdas
            for weights in [change_of_base.at(scale)]
        ]
        best = min(grid, key=lambda point: point["mean"])
        chosen = change(study, method, best["density"]).at(best["lambda"])
        found[method] = {
            "lambda": best["lambda"],
            "density": best["density"],
            **study.score(chosen, study.kinds, "test"),
            "grid": [{k: p[k] for k in ("lambda", "density", "mean", "kept")} for p in grid],
        }
    return found


if __name__ == "__main__":
    main("quality", measure)
