"""The linear system ``G alpha = s`` of few features, by a Cholesky factor of the whole of G."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_stf.core.precision import length
from mergekit_stf.core.solve.solution import Solution
from mergekit_stf.core.tolerances import WELL_POSED


def cholesky_solve(G: Tensor, s: Tensor, tolerance: float) -> Solution | None:
    """Solve a small well-posed system.

    Args:
        G: the Gram matrix of all features, (r, r) in float64.
        s: the right-hand side, (r,) in float64.
        tolerance: relative residual that the answer must reach.

    Returns:
        The exact solution; None where the system is so ill-posed that the exact solution may not be
        wanted, which the Lanczos process tells and damps.
    """
    scale = length(s)
    target = s / scale
    factor, failure = torch.linalg.cholesky_ex(G)
    alpha = torch.cholesky_solve(target.unsqueeze(1), factor).squeeze(1)
    missed = torch.linalg.vector_norm(torch.mv(G, alpha) - target)
    energy, residual = torch.stack([target @ alpha, missed]).tolist()
    if failure or not residual <= tolerance or energy > WELL_POSED or not math.isfinite(energy):
        return None
    pivots = factor.diagonal()
    return Solution(
        alpha=alpha * scale,
        iterations=0,
        residual=residual,
        converged=True,
        condition=float((pivots.max() / pivots.min()).square()),
        energy=energy,
        ridge=0.0,
        cutoff=0.0,
    )
