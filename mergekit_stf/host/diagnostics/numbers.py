"""The numbers of one weight's record, from the engine's reports of its matrices."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_stf.core.superpose import Report


def summary(reports: Sequence[Report], order: Sequence[int]) -> dict[str, Any]:
    """Return the record's fields for one matrix, or for the matrices of an expert stack.

    Lengths and interference are those of the whole stack; the solve is described by the matrix
    that needs attention most, the one with the largest condition.

    Args:
        reports: one for each matrix.
        order: the order of the tasks in the record, as indices into the reports' lists.
    """
    if not reports:
        return {}
    worst = max(reports, key=lambda report: report.condition)
    kept = [sum(ranks) for ranks in zip(*(report.ranks for report in reports), strict=True)]
    return {
        "routes": [worst.routes[task] for task in order],
        "kept": [kept[task] for task in order],
        "iterations": max(report.iterations for report in reports),
        "residual": max(report.residual for report in reports),
        "precision": next((r.precision for r in reports if r.precision != "full"), "full"),
        "converged": all(report.converged for report in reports),
        "condition": worst.condition,
        "energy": max(report.energy for report in reports),
        "ridge": max(report.ridge for report in reports),
        "cutoff": max(report.cutoff for report in reports),
        "alpha_ratio": list(worst.alpha_ratio),
        "spectra": [list(worst.spectra[task]) for task in order],
        **_lengths(reports, order),
    }


def _lengths(reports: Sequence[Report], order: Sequence[int]) -> dict[str, Any]:
    gram = torch.stack([_gram(report) for report in reports]).sum(dim=0)[order][:, order]
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, norms, 1.0)
    return {
        "norms": norms.tolist(),
        "norm_sum": _length(report.sum_norm for report in reports),
        "norm_merged": _length(report.merged_norm for report in reports),
        "cosine": (gram / torch.outer(scale, scale)).tolist(),
    }


def _gram(report: Report) -> torch.Tensor:
    """Return ``⟨M_i, M_j⟩``, (T, T), from the lengths and the overlaps."""
    norms = torch.tensor(report.norms, dtype=torch.float64)
    overlaps = torch.tensor(report.overlaps, dtype=torch.float64)
    gram = overlaps * torch.outer(norms, norms)
    gram.diagonal().copy_(norms.square())
    return gram


def _length(parts: Iterable[float]) -> float:
    return math.sqrt(sum(part * part for part in parts))


def peak_rss() -> int | None:
    """Return the process's memory high-water mark in bytes, None where the system has none.

    Linux counts a parent's memory in ``ru_maxrss`` of a child, but not in ``VmHWM``.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device(device: torch.device) -> int | None:
    """Return the most memory ever allocated on an accelerator, None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
