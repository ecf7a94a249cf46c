"""Figure 3(a): superposing task matrices against superposing the fine-tuned matrices themselves.

Fine-tuned: ``P = lambda STF({P_i})`` for each linear map, with the ridge that the engine chooses
for a system that is nearly singular. All other weights are merged alike in both, at the ``lambda``
that is best for the task matrices on the validation split.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.paper.common import Change, Study, change, is_matrix, main
from mergekit_stf.core import superpose

SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


def measure(study: Study) -> dict[str, list[dict[str, Any]]]:
    task = change(study, "stf")
    rest = min((0.15, 0.2, 0.25, 0.3), key=lambda scale: validation(study, task, scale))
    tuned = fine_tuned(study, task, rest)
    return {
        "task": [point(study, task, scale) for scale in SCALES],
        "fine-tuned": [point(study, tuned, scale) for scale in SCALES],
    }


def validation(study: Study, merged: Change, scale: float) -> float:
    mean: float = study.score(merged.at(scale), study.kinds, "validation")["mean"]
    return mean


def point(study: Study, merged: Change, scale: float) -> dict[str, Any]:
    score = study.score(merged.at(scale), study.kinds, "test")
    return {"lambda": scale, "mean": score["mean"], "kept": score["kept"]}


def fine_tuned(study: Study, task: Change, rest: float) -> Change:
    """Superpose the fine-tuned matrices; the base under them is zero."""
    base, scaled, fixed = {}, {}, {}
    other = task.at(rest)
    for name, P in study.base.items():
        if is_matrix(name, P):
            base[name] = torch.zeros_like(P)
            scaled[name] = superpose([t[name] for t in study.tuned.values()], name=name).M
        else:
            base[name], fixed[name] = other[name], torch.zeros_like(P)
    return Change(base, scaled, fixed)


if __name__ == "__main__":
    main("matrices", measure)
