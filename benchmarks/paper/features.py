"""Figure 5: dropping the smallest or the largest singular features before merging.

At the best ``lambda`` of the whole merge, and at each dropped share's own best, for a dropped part
also changes the length of the merged matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.paper.common import Change, Study, change, is_matrix, main
from mergekit_stf.core import superpose

SCALES = (0.3, 0.4, 0.6, 0.9)
SHARES = {"smallest": (0.0, 0.2, 0.5, 0.8, 0.9, 0.95), "largest": (0.0, 0.02, 0.05, 0.1, 0.2)}


def measure(study: Study) -> dict[str, list[dict[str, Any]]]:
    whole = change(study, "stf")
    fixed_scale = best(study, whole)
    decomposed = {
        name: [torch.linalg.svd(t[name] - P, full_matrices=False) for t in study.tuned.values()]
        for name, P in study.base.items()
        if is_matrix(name, P)
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for end, shares in SHARES.items():
        found[end] = []
        for share in shares:
            merged = without(whole, decomposed, end, share)
            own_scale = best(study, merged)
            scores = {
                scale: study.score(merged.at(scale), study.kinds, "test")
                for scale in {fixed_scale, own_scale}
            }
            found[end].append(
                {
                    "dropped": share,
                    "lambda": own_scale,
                    "at fixed lambda": scores[fixed_scale],
                    "at own lambda": scores[own_scale],
                }
            )
    return found


def best(study: Study, merged: Change) -> float:
    def loss(scale: float) -> float:
        mean: float = study.score(merged.at(scale), study.kinds, "validation")["mean"]
        return mean

    return min(SCALES, key=loss)


def without(whole: Change, decomposed: dict[str, Any], end: str, share: float) -> Change:
    """Superpose what is left of each task matrix without that share of its features."""
    scaled = dict(whole.scaled)
    for name, triples in decomposed.items():
        count = triples[0].S.numel()
        cut = round(share * count)
        kept = slice(0, count - cut) if end == "smallest" else slice(cut, count)
        matrices = [(t.U[:, kept] * t.S[kept]) @ t.Vh[kept] for t in triples]
        scaled[name] = superpose(matrices, name=name).M
    return Change(whole.base, scaled, whole.fixed)


if __name__ == "__main__":
    main("features", measure)
