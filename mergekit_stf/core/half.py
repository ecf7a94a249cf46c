"""The solve of bfloat16 checkpoints by products in bfloat16, checked against the answer itself.

bfloat16 has eight bits, and processors with units for it multiply it two to ten times as fast as
float32. Two things are small enough to be formed in it. G differs from the identity by cosines
that are products of two, about 1/n for unrelated tasks, so that their rounding moves M by a few
ten-thousandths. And the plain sum of the task matrices is known without any product, so that only
what STF adds to it is one:

    M = Σ_i M_i + Σ_k (alpha_k - s_k) u_k v_kᵀ

Many tasks are swept for what this sum lacks. Rounding the checkpoints to bfloat16 has
moved M by a hundred times as much (``benchmarks/accuracy.py``). Where tasks nearly agree or
contradict each other, G is close to singular and magnifies the rounding: what the solve tells of
G's condition, and responses of the finished M measured in float32, decide whether the answer is
taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_stf.core import sweeps
from mergekit_stf.core.features import Features, kept_rank
from mergekit_stf.core.gram import Blocks, few, responses, spans
from mergekit_stf.core.precision import has_bfloat16
from mergekit_stf.core.solve import Solution, solve, well_posed
from mergekit_stf.core.tolerances import HALF_CHANGE, HALF_ERROR, WELL_POSED

SMALLEST = 256
"""Below this smaller side there is nothing to gain, and rounding shows more."""

SAMPLED = 16
"""One feature of so many is measured in the end."""


def worthwhile(M: Tensor, rank: float) -> bool:
    """Say whether to solve in bfloat16, from one task matrix and the option ``rank``."""
    m, n = M.shape
    whole = kept_rank((m, n), rank) == min(m, n) >= SMALLEST
    return whole and M.dtype == torch.float32 and has_bfloat16(M.device)


def superposed(features: Sequence[Features], total: Tensor) -> Solution | None:
    """Solve ``G alpha = s`` and assemble M with products in bfloat16.

    With the residual ``ρ = s - diag(UᵀMV)``, M is off by ``(ρᵀ G⁻¹ ρ)^½``, at most ``|ρ|`` times
    the root of G's condition, as its largest eigenvalue is 1 or more. It is asked of each task, so
    that a short one does not drown in what longer ones leave.

    Args:
        features: of each task, over float32 matrices of one shape, all of each matrix.
        total: the sum of the task matrices, (m, n).

    Returns:
        The solution with M, its residual measured on a sample of the features; ``None`` where
        bfloat16 is not enough.
    """
    by_sweeps = sweeps.worthwhile(features)
    found = (_by_sweeps if by_sweeps else _by_blocks)(features, total)
    if found is None or found.M is None:
        return None
    change, length = (torch.linalg.vector_norm(x) for x in (found.M - total, found.M))
    if change > HALF_CHANGE * length:
        return None
    lacking, asked = sampled(features, found.M)
    worst = float((lacking / asked).max())
    if worst * math.sqrt(found.condition) > HALF_ERROR:
        return None
    residual = float(torch.linalg.vector_norm(lacking) / torch.linalg.vector_norm(asked))
    return replace(found, residual=residual, precision="bfloat16")


def _by_blocks(features: Sequence[Features], total: Tensor) -> Solution | None:
    if not few(features):
        return None
    operator = HalfBlocks(features)
    found = solve(features, operator=operator)
    if found.cutoff or not found.converged:
        return None
    change = torch.cat(found.alpha) - torch.cat([f.s for f in features])
    return replace(found, M=total + operator.combine(change))


def _by_sweeps(features: Sequence[Features], total: Tensor) -> Solution | None:
    """Sweep for what the sum lacks, ``G (alpha - s) = s - G s``, which is measured in float32."""
    narrow = [
        Features(f.U.bfloat16(), f.s - responses(f, total), f.Vh.bfloat16(), f.route)
        for f in features
    ]
    change = sweeps.swept(narrow)
    if change is None:
        return None
    s = torch.cat([f.s for f in features])
    M = total + change.M
    energy = float(torch.linalg.vector_norm(M) / torch.linalg.vector_norm(s)) ** 2
    if energy > WELL_POSED:
        return None
    return well_posed(features, replace(change, alpha=s + change.alpha, M=M, energy=energy))


class HalfBlocks(Blocks):
    """G by its blocks above the diagonal, one row of blocks at a time, formed in bfloat16.

    Attributes:
        Uh, Vh: the stacked features of all tasks, one a row, (r, m) and (r, n).
    """

    def __init__(self, features: Sequence[Features]) -> None:
        self.Uh = torch.cat([f.U.mT.bfloat16() for f in features])
        self.Vh = torch.cat([f.Vh.bfloat16() for f in features])
        self.blocks = []
        for rows in spans(features)[:-1]:
            later = slice(rows.stop, self.Uh.shape[0])
            cosines = self.Uh[rows] @ self.Uh[later].mT
            cosines *= self.Vh[rows] @ self.Vh[later].mT
            self.blocks.append((rows, later, cosines.float()))

    def combine(self, alpha: Tensor) -> Tensor:
        """Assemble ``Σ_k alpha_k u_k v_kᵀ``, (m, n) in bfloat16."""
        return (self.Uh * alpha.bfloat16().unsqueeze(1)).mT @ self.Vh


def sampled(features: Sequence[Features], M: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the responses ``u_kᵀ M v_k`` of each task lack, estimated, and their target.

    The sample holds the ``SAMPLED`` leading features of each task, which ask for most, and after
    them the middle one of every ``SAMPLED``, whose lack stands for that of its neighbours.

    Returns:
        ``|s_i - diag(U_iᵀ M V_i)|`` and ``|s_i|``, each (T,) in float64 on the CPU.
    """
    lacking, asked = [], []
    for f in features:
        leading = range(min(SAMPLED, f.rank))
        sample = [*leading, *range(SAMPLED + SAMPLED // 2, f.rank, SAMPLED)]
        part = Features(f.U[:, sample], f.s[sample], f.Vh[sample], f.route)
        square = (part.s - responses(part, M)).double().square()
        lacking.append(float(square[:SAMPLED].sum() + SAMPLED * square[SAMPLED:].sum()) ** 0.5)
        asked.append(float(torch.linalg.vector_norm(f.s, dtype=torch.float64)))
    return torch.tensor(lacking, dtype=torch.float64), torch.tensor(asked, dtype=torch.float64)
