"""The report of a merge in factors, from the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_stf.core.lowrank import FactoredSuperposition, gram_matrix
from mergekit_stf.core.superpose import Report, assembled_report


def report_of(merged: FactoredSuperposition) -> Report:
    """Return what `mergekit_stf.core.superpose.superpose` reports, here with exact overlaps.

    Nothing of the size of the matrix is formed: ``<M_i, M_j> = s_iᵀ ((U_iᵀU_j) ∘ (V_iᵀV_j)) s_j``.
    """
    features, solution = merged.features, merged.solution
    inner, norm = _lengths(merged)
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, norms, 1.0)
    return assembled_report(
        features,
        solution,
        shape=merged.M.shape,
        norms=norms,
        merged_norm=norm,
        sum_norm=float(inner.sum().clamp(min=0).sqrt()),
        overlaps=inner / torch.outer(scale, scale),
    )


def _lengths(merged: FactoredSuperposition) -> tuple[Tensor, float]:
    """Return ``<M_i, M_j>`` of the kept features, (T, T) in float64, and ``|M|``."""
    features, solution = merged.features, merged.solution
    if solution is None:
        return torch.zeros(len(features), len(features), dtype=torch.float64), 0.0
    G = merged.gram
    if G is None:
        U = torch.cat([f.U for f in features], dim=1)
        G = gram_matrix(U, torch.cat([f.Vh for f in features]))
    ranks = torch.tensor([f.rank for f in features])
    s = torch.cat([f.s for f in features]).double()
    tasks = torch.arange(len(features))
    S = s * (tasks.unsqueeze(1) == tasks.repeat_interleave(ranks))
    alpha = torch.cat(solution.alpha).double()
    return S @ G @ S.mT, float((alpha @ G @ alpha).clamp(min=0).sqrt())
