"""The record of a weight that was merged in parts, and the order of its tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergekit_stf.core import Record


def join_records(records: Sequence[Record]) -> Record:
    """Return the record of a weight whose matrices were merged one by one.

    Lengths and interference are those of the whole; the solve is described by the matrix that needs
    attention most, the one with the largest condition.

    Args:
        records: one for each matrix, at least one.
    """
    if len(records) == 1:
        return records[0]
    worst = max(records, key=lambda record: record.condition or 0.0)
    kept = [record.kept for record in records]
    return replace(
        worst,
        kept=tuple(sum(counts) for counts in zip(*kept, strict=True)),
        converged=None if worst.converged is None else all(r.converged for r in records),
        facts={name: largest_known(r.facts.get(name) for r in records) for name in worst.facts},
        **{
            name: largest_known(getattr(record, name) for record in records)
            for name in ("iterations", "residual", "energy", "ridge", "cutoff")
        },
        **_join_norms(records),
    )


def sorted_by_model(record: Record) -> Record:
    """Return the record with its tasks in the order of their models' names."""
    order = sorted(range(len(record.models)), key=record.models.__getitem__)

    def reorder(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[task] for task in order) if values else ()

    lists: dict[str, Any] = {
        name: reorder(getattr(record, name))
        for name in ("models", "routes", "kept", "spectra", "norms")
    }
    return replace(record, cosine=reorder([reorder(row) for row in record.cosine]), **lists)


def largest_known(values: Iterable[Any]) -> Any:
    """Return the largest of the values that are known, None if none is."""
    return max((value for value in values if value is not None), default=None)


def _join_norms(records: Sequence[Record]) -> dict[str, Any]:
    """Return the lengths of the whole and its cosines: squares and inner products add up."""
    if not all(record.norms for record in records):
        return {}
    norms = torch.tensor([record.norms for record in records], dtype=torch.float64)
    cosines = torch.tensor([record.cosine for record in records], dtype=torch.float64)
    inner = (cosines * norms.unsqueeze(1) * norms.unsqueeze(2)).sum(dim=0)
    whole = torch.linalg.vector_norm(norms, dim=0)
    scale = torch.where(whole > 0, whole, 1.0)
    return {
        "norms": tuple(whole.tolist()),
        "norm_sum": math.hypot(*(record.norm_sum or 0.0 for record in records)),
        "norm_merged": math.hypot(*(record.norm_merged or 0.0 for record in records)),
        "cosine": tuple(map(tuple, (inner / torch.outer(scale, scale)).tolist())),
    }
