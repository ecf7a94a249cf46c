"""The solve of bfloat16 checkpoints by products in bfloat16, checked against the answer itself.

bfloat16 has eight bits, and processors with units for it multiply it twice as fast as float32, or
more. Two things are small enough to be formed in it. G differs from the identity by cosines that
are products of two, about 1/n for unrelated tasks, so that their rounding moves M by a few
ten-thousandths. And the plain sum of the task matrices is known without any product, so that only
what STF adds to it is one:

    M = Σ_i M_i + Σ_k (alpha_k - s_k) u_k v_kᵀ

Rounding the checkpoints to bfloat16 has moved M by seventy times as much
(``benchmarks/accuracy.py``). Where tasks nearly agree or contradict each other, G is close to
singular and magnifies the rounding: what the solve tells of G's condition, and responses of the
finished M measured in float32, decide whether the answer is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_stf.core.features import Features, kept_rank
from mergekit_stf.core.gram import few, pairs, responses, spans
from mergekit_stf.core.precision import has_bfloat16, length
from mergekit_stf.core.solve import Solution, solve
from mergekit_stf.core.tolerances import HALF_CHANGE, HALF_ERROR

SMALLEST = 256
"""Below this smaller side there is nothing to gain, and rounding shows more."""

LARGEST = 4096
"""Above this smaller side the copies in bfloat16 take more memory than a merge may."""

MOVED = 16
"""Features of each task that are measured because the solve moved their weights furthest."""

EVERY = 16
"""And one of so many others."""

PORTION = 2**18
"""Entries of a block that are widened to float32 at a time, 1 MB: they stay in the cache."""


def worthwhile(M: Tensor, rank: float) -> bool:
    """Say whether to solve in bfloat16, from one task matrix and the option ``rank``."""
    m, n = M.shape
    whole = kept_rank((m, n), rank) == min(m, n)
    fits = SMALLEST <= min(m, n) <= LARGEST
    return whole and fits and M.dtype == torch.float32 and has_bfloat16(M.device)


def superposed(features: Sequence[Features], total: Tensor) -> Solution | None:
    """Solve ``G alpha = s`` and assemble M with products in bfloat16.

    With the residual ``ρ = s - diag(UᵀMV)``, the part of M in the span of the features is off by
    ``(ρᵀ G⁻¹ ρ)^½``, at most ``|ρ|`` times the root of G's condition, as its largest eigenvalue is
    1 or more; ``ρ`` is estimated from a sample and the condition from the Lanczos process. It is
    asked of each task, so that a short one does not drown in what longer ones leave. The rounding
    of what is added, mostly outside the span, is bounded by its length.

    Args:
        features: of each task, over float32 matrices of one shape, all of each matrix.
        total: the sum of the task matrices, (m, n).

    Returns:
        The solution with M, its residual estimated from a sample of the features; ``None`` where
        bfloat16 is not enough, or where many tasks are not solved by blocks.
    """
    if not few(features, needed(features)):
        return None
    halved = Halved(features)
    found = solve(features, operator=HalfBlocks(halved, spans(features)))
    if found.cutoff or not found.converged:
        return None
    moved = [a - f.s for a, f in zip(found.alpha, features, strict=True)]
    change = halved.combine(torch.cat(moved))
    M = total + change
    if not length(change) <= HALF_CHANGE * length(M):
        return None
    lacking, asked = sampled(features, moved, M)
    if not float((lacking / asked).max()) * math.sqrt(found.condition) <= HALF_ERROR:
        return None
    residual = float(torch.linalg.vector_norm(lacking) / torch.linalg.vector_norm(asked))
    return replace(found, M=M, residual=residual, precision="bfloat16")


class Halved:
    """The stacked features of all tasks in bfloat16.

    Attributes:
        Uh, Vh: one feature a row, (r, m) and (r, n).
    """

    def __init__(self, features: Sequence[Features]) -> None:
        self.Uh = torch.cat([f.U.mT.bfloat16() for f in features])
        self.Vh = torch.cat([f.Vh.bfloat16() for f in features])

    def combine(self, alpha: Tensor) -> Tensor:
        """Assemble ``Σ_k alpha_k u_k v_kᵀ``, (m, n) in bfloat16."""
        return (self.Uh * alpha.bfloat16().unsqueeze(1)).mT @ self.Vh


class HalfBlocks:
    """G by its blocks above the diagonal, one row of blocks at a time, in bfloat16.

    Attributes:
        blocks: of each task but the last, where its features are among all, and their cosines with
            those of all later tasks.
    """

    def __init__(self, halved: Halved, tasks: Sequence[slice]) -> None:
        self.blocks: list[tuple[slice, Tensor]] = []
        for rows in tasks[:-1]:
            later = slice(rows.stop, tasks[-1].stop)
            cosines = halved.Uh[rows] @ halved.Uh[later].mT
            self.blocks.append((rows, cosines.mul_(halved.Vh[rows] @ halved.Vh[later].mT)))

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``: products in float32, of portions of the blocks."""
        result, narrow = alpha.clone(), alpha.float()
        for rows, block in self.blocks:
            later = slice(rows.stop, alpha.numel())
            across, down = narrow.new_empty(block.shape[0]), torch.zeros_like(narrow[later])
            step = max(1, PORTION // block.shape[1])
            parts = (torch.split(x, step) for x in (block, across, narrow[rows]))
            for part, target, weights in zip(*parts, strict=True):
                wide = part.float()
                torch.mv(wide, narrow[later], out=target)
                down.addmv_(wide.mT, weights)
            result[rows] += across
            result[later] += down
        return result


def needed(features: Sequence[Features]) -> int:
    """Return the bytes of the features in bfloat16, of the blocks of G and of the first row again.

    A row is the product of two, of which the first has the most entries.
    """
    copies = sum(f.U.numel() + f.Vh.numel() for f in features)
    row = features[0].rank * sum(f.rank for f in features[1:])
    return (copies + pairs(features) + row) * torch.bfloat16.itemsize


def sampled(
    features: Sequence[Features], moved: Sequence[Tensor], M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the responses ``u_kᵀ M v_k`` of each task lack, estimated, and their target.

    The sample holds the ``MOVED`` features of each task whose weights the solve moved furthest,
    ``|alpha_k - s_k|``, where rounding is magnified, and evenly one of ``EVERY`` others, whose lack
    stands for that of all others.

    Returns:
        ``|s_i - diag(U_iᵀ M V_i)|`` and ``|s_i|``, each (T,) in float64 on the CPU.
    """
    lacking, asked = [], []
    for f, move in zip(features, moved, strict=True):
        order = move.abs().argsort(descending=True, stable=True)
        head, rest = order[:MOVED], order[MOVED:].sort().values
        picked = rest[EVERY // 2 :: EVERY] if rest.numel() > EVERY // 2 else rest
        sample = torch.cat([head, picked])
        part = Features(f.U[:, sample], f.s[sample], f.Vh[sample], f.route)
        square = (part.s - responses(part, M)).double().square()
        share = rest.numel() / max(1, picked.numel())
        lacking.append(float(square[:MOVED].sum() + share * square[MOVED:].sum()) ** 0.5)
        asked.append(float(torch.linalg.vector_norm(f.s, dtype=torch.float64)))
    return torch.tensor(lacking, dtype=torch.float64), torch.tensor(asked, dtype=torch.float64)
