"""The numbers of one weight's record, from what the method has in hand after merging it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SPECTRUM_POINTS = 16

_CHUNK = 1 << 20


class SolveReport(Protocol):
    """What is read of the engine's report of one matrix.

    ``kept`` counts the features of each task; ``s`` and ``alpha`` hold the right-hand side and
    the solution of ``Gα = s``, task after task, so their length is the sum of ``kept``.
    """

    route: str
    kept: Sequence[int]
    iterations: int
    residual: float
    ridge: float
    condition: float
    s: torch.Tensor
    alpha: torch.Tensor


def norms(deltas: Sequence[torch.Tensor], merged: torch.Tensor) -> dict[str, Any]:
    """Return lengths and mutual cosines of the task matrices, and the length of M."""
    gram = _gram(deltas)
    length = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(length > 0, length, 1.0)
    return {
        "norms": length.tolist(),
        "norm_sum": gram.sum().clamp(min=0).sqrt().item(),
        "norm_merged": torch.linalg.vector_norm(merged, dtype=torch.float64).item(),
        "cosine": (gram / torch.outer(scale, scale)).tolist(),
    }


def _gram(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ``⟨M_i, M_j⟩`` as a T×T float64 matrix on the CPU, in memory for one chunk each."""
    flat = [delta.reshape(-1) for delta in deltas]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), _CHUNK):
        rows = torch.stack([row[start : start + _CHUNK] for row in flat])
        gram += (rows @ rows.T).double()
    return gram.cpu()


def summary(reports: Sequence[SolveReport]) -> dict[str, Any]:
    """Fold the reports of an expert stack into the one that needs attention most."""
    if not reports:
        return {}
    worst = max(reports, key=lambda report: report.condition)
    return {
        "route": worst.route,
        "kept": [sum(kept) for kept in zip(*(report.kept for report in reports), strict=True)],
        "iterations": max(report.iterations for report in reports),
        "residual": max(report.residual for report in reports),
        "ridge": max(report.ridge for report in reports),
        "condition": worst.condition,
        "alpha_ratio": _alpha_ratio(worst),
        "spectra": [
            _sampled(part) for part in torch.split(worst.s.double().cpu(), list(worst.kept))
        ],
    }


def _alpha_ratio(report: SolveReport) -> list[float]:
    if not sum(report.kept):
        return []
    ratio = (report.alpha.double() / report.s.double()).cpu()
    ordered: list[float] = torch.quantile(ratio, torch.tensor(QUANTILES).double()).tolist()
    return ordered


def _sampled(s: torch.Tensor) -> list[float]:
    return [float(s[rank - 1]) for rank in spectrum_ranks(len(s))]


def spectrum_ranks(kept: int) -> list[int]:
    """Return the ranks, counted from 1, at which a spectrum of ``kept`` values is sampled."""
    if kept == 0:
        return []
    return [round(kept ** (step / (SPECTRUM_POINTS - 1))) for step in range(SPECTRUM_POINTS)]


def peak_rss() -> int | None:
    """Return the process's memory high-water mark in bytes, None where the system has none."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device(device: torch.device) -> int | None:
    """Return the most memory ever allocated on an accelerator, None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
