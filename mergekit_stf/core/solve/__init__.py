"""Linear systems of the methods: the Gram matrix of the features, its solvers, one selector."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.solve.cholesky import cholesky_solve
from mergekit_stf.core.solve.gram import Gram, Whole, choose_gram
from mergekit_stf.core.solve.lanczos import krylov_solve
from mergekit_stf.core.solve.solution import Solution
from mergekit_stf.core.tolerances import RESIDUAL

__all__ = ["Gram", "Solution", "choose_gram", "solve"]


def solve(
    features: Sequence[Features], ridge: float | None = None, operator: Gram | None = None
) -> Solution:
    """Solve ``G alpha = s`` for the stacked features of all tasks (STF paper, Theorem 1).

    Args:
        features: of each task, none of rank 0, over matrices of one shape.
        ridge: added to the diagonal of G; ``None`` adds none and damps ill-posed systems.
        operator: G, where the caller has it already.

    Returns:
        The solution; whether it converged is part of it.
    """
    G = operator or choose_gram(features)
    s = torch.cat([f.s for f in features]).double()
    tolerance = RESIDUAL[features[0].s.dtype]
    if isinstance(G, Whole) and ridge is None:
        exact = cholesky_solve(G.matrix, s, tolerance)
        if exact is not None:
            return exact
    return krylov_solve(G, s, ridge, tolerance)
