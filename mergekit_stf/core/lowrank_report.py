"""The report of a merge in factors, from the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.lowrank import FactoredSuperposition
from mergekit_stf.core.superpose import Report

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def report_of(merged: FactoredSuperposition) -> Report:
    """Return what `mergekit_stf.core.superpose.superpose` reports, here with exact overlaps.

    Nothing of the size of the matrix is formed: ``<M_i, M_j> = s_iᵀ ((U_iᵀU_j) ∘ (V_iᵀV_j)) s_j``.
    """
    features, solution = merged.features, merged.solution
    inner = inner_products(features)
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, norms, 1.0)
    return Report(
        shape=merged.M.shape,
        routes=tuple(f.route for f in features),
        ranks=tuple(f.rank for f in features),
        spectra=tuple(f.spectrum for f in features),
        norms=tuple(norms.tolist()),
        merged_norm=merged.M.norm,
        sum_norm=float(inner.sum().clamp(min=0).sqrt()),
        overlaps=tuple(map(tuple, (inner / torch.outer(scale, scale)).tolist())),
        iterations=solution.iterations if solution else 0,
        residual=solution.residual if solution else 0.0,
        converged=solution.converged if solution else True,
        condition=solution.condition if solution else 1.0,
        energy=solution.energy if solution else 0.0,
        ridge=solution.ridge if solution else 0.0,
        cutoff=solution.cutoff if solution else 0.0,
        alpha_ratio=_alpha_ratio(merged),
    )


def inner_products(features: tuple[Features, ...]) -> Tensor:
    """Return ``<M_i, M_j>`` of the kept features, (T, T), in float64."""
    U = torch.cat([f.U.double() for f in features], dim=1)
    Vh = torch.cat([f.Vh.double() for f in features])
    s = torch.cat([f.s.double() for f in features])
    rows = [
        ((f.U.double() * f.s.double()).mT @ U).mul_(f.Vh.double() @ Vh.mT).sum(dim=0) * s
        for f in features
    ]
    parts = torch.split(torch.stack(rows), [f.rank for f in features], dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


def _alpha_ratio(merged: FactoredSuperposition) -> tuple[float, ...]:
    if merged.solution is None:
        return ()
    s = torch.cat([f.s for f in merged.features])
    ordered = (torch.cat(merged.solution.alpha) / s).sort().values
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return tuple(ordered[(levels * (s.numel() - 1)).long()].tolist())
