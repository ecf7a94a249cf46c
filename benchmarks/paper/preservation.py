"""Figure 1 and appendix A: preservation of features against quality, method by method.

The error of a feature is ``|<s u, M v - s u>|`` with the method's M at ``lambda`` = 1 and the
features of the untrimmed task matrices, averaged over all features of all tasks and all input
matrices of the feed-forward layers (``gate_proj`` and ``up_proj``). The plot sets it against the
share of the specialists' gain kept at the same density and the best ``lambda`` for it, both on the
validation split, from the ``quality`` question.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from benchmarks.paper.common import Study, change, main

POINTS = (
    ("linear", 1.0),
    ("task_arithmetic", 1.0),
    ("trimmed_sum", 0.2),
    ("ties", 0.2),
    ("ties", 1.0),
    ("stf", 0.2),
    ("stf", 1.0),
)
INPUTS = re.compile(r"mlp\.(gate|up)_proj")
OUTPUTS = re.compile(r"mlp\.down_proj")
ATTENTION = re.compile(r"self_attn\.[qkvo]_proj")


def measure(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "density": density,
            "inputs": error(study, method, density, INPUTS),
            "outputs": error(study, method, density, OUTPUTS),
            "attention": error(study, method, density, ATTENTION),
        }
        for method, density in POINTS
    ]


def error(study: Study, method: str, density: float, names: re.Pattern[str]) -> float:
    """Return the mean error in float64, relative to the mean of ``s²`` (the error of M = 0)."""
    merged = change(study, method, density).at(1.0)
    errors, squares = [], []
    for name, P in study.base.items():
        if not names.search(name):
            continue
        M = merged[name].double() - P.double()
        for tuned in study.tuned.values():
            U, s, Vh = torch.linalg.svd(tuned[name].double() - P.double(), full_matrices=False)
            response = torch.einsum("mk,mn,kn->k", U, M, Vh)
            errors.append(s * (response - s).abs())
            squares.append(s * s)
    return float(torch.cat(errors).mean() / torch.cat(squares).mean())


if __name__ == "__main__":
    main("preservation", measure)
