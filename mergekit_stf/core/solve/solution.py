"""What a solver returns: the weights of the features, and how they were found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """The answer to ``G alpha = s``.

    Attributes:
        alpha: the weights of the stacked features of all tasks, (r,) in float64.
        iterations: applications of G; 0 where it was factored.
        residual: ``|G alpha - s| / |s|`` of the system that was solved, (G + ridge I) with a ridge.
        converged: the residual, or the change of a damped solution, came below the tolerance.
        condition: a lower bound of the condition number of G.
        energy: ``|M|² / Σ|M_i|²`` of the exact solution, or the bound at which it was given up.
        ridge: the ridge that was added to the unit diagonal of G.
        cutoff: eigenvalue below which G was damped; 0 where the answer is exact.
    """

    alpha: Tensor
    iterations: int
    residual: float
    converged: bool
    condition: float
    energy: float
    ridge: float
    cutoff: float
