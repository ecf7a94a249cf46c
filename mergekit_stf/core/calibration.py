"""Singular value calibration: what tasks have inflated together is reduced, after any method.

*When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging*, ICML 2026,
arXiv 2602.05536, algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import Merged, combined
from mergekit_stf.core.precision import length
from mergekit_stf.core.task_matrices import TaskMatrices


def calibrate(merged: Merged, tasks: TaskMatrices, alpha: float) -> Merged:
    """Divide each singular value of M by how much M overstates what tasks do along its direction.

    With ``M = Σ_r s_r u_r v_rᵀ``, each task responds along the output direction ``u_r`` by
    ``a_i = u_rᵀ M_i``, and M by ``a = u_rᵀ M`` (equation 4). The projection of a on the response
    of a task is ``c_i = ⟨a, a_i⟩ / |a_i|²`` times that response (equation 8): above 1, it is
    overstated. The singular value becomes ``s_r T / Σ_i max(alpha, c_i)``; vectors stay.

    With ``alpha`` 1, the default of the authors' program, values are only reduced, and the sum of
    tasks with orthogonal inputs is left as it is. Below 1, the singular values of M may grow, by
    ``1 / alpha`` at most: the authors' script has ``1 / T`` for all methods but TSV-M, with 1.
    Ours differs in two points. ``alpha`` and the calibration come before ``lambda``. A response
    below the square root of the type's rounding, relative to the task matrix, counts as none
    (``c_i = 0``): the error of ``c_i`` would be as large as ``c_i``; the authors' code has an
    absolute bound of 1e-12 on ``|a_i|²``.

    Args:
        merged: what a method made of the tasks.
        tasks: the task matrices.
        alpha: bound of the coefficients from below; at 0, M is left as it is.

    Returns:
        The calibrated matrix, in factors where M is. The fact ``calibration`` of the record is the
        length that is left, relative to that of M.
    """
    if not alpha:
        return merged
    given = merged.features or TaskMatrices.of([merged.M], name=tasks.name).features()[0]
    if not given.rank:
        return merged
    sums = _sum_coefficients(given if tasks.input_axis else given.transposed, tasks, alpha)
    f = replace(given, s=given.s * (tasks.count / sums))
    facts = merged.record.facts | {"calibration": f.norm / given.norm}
    M = combined(tasks, [f], [f.s])
    M = M if isinstance(M, LowRank) else M.to(tasks.dtype)
    return Merged(M, replace(merged.record, norm_merged=f.norm, facts=facts), f)


def _sum_coefficients(f: Features, tasks: TaskMatrices, alpha: float) -> Tensor:
    """Return ``Σ_i max(alpha, c_i)`` of each singular direction, (r,).

    Args:
        f: the singular triples of M, outputs first.
        tasks: the task matrices.
        alpha: see ``calibrate``.
    """
    sums = torch.zeros_like(f.s)
    for M in tasks.read():
        size = M.norm if isinstance(M, LowRank) else length(M)
        response = _find_response(f, M if tasks.input_axis else _transpose(M)) / (size or 1.0)
        square = response.square().sum(dim=1)
        along = f.s / (size or 1.0) * (response * f.Vh).sum(dim=1)
        heard = square > torch.finfo(square.dtype).eps
        sums += torch.where(heard, along / square, 0.0).clamp(min=alpha)
    return sums


def _transpose(M: Tensor | LowRank) -> Tensor | LowRank:
    return M.transposed if isinstance(M, LowRank) else M.mT


def _find_response(f: Features, M: Tensor | LowRank) -> Tensor:
    """Return ``Uᵀ M``, (r, n), without forming M where it is in factors."""
    if isinstance(M, LowRank):
        return (f.U.mT @ M.left.to(f.U.dtype)) @ M.right.to(f.U.dtype)
    return f.U.mT @ M.to(f.U.dtype)
