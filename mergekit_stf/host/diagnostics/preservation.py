"""How well a merge preserves task-specific features: the paper's appendix A.

For every feature ``(σ, u, v)`` of every task matrix, ``|⟨σu, M̄v − σu⟩| = σ |uᵀM̄v − σ|``, where
M̄ is a method's merged task matrix without scaling (λ = 1). Zero means that the merged matrix
still answers v with σu, and that all else in the answer is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.api import merge_tensors

from mergekit_stf.core import LowRank, STFError
from mergekit_stf.core.features import kept_rank
from mergekit_stf.core.tolerances import RANK
from mergekit_stf.host.merging.differences import form_differences
from mergekit_stf.host.merging.job import merge_matrix
from mergekit_stf.host.merging.parts import locate_parts
from mergekit_stf.host.planning.planned import PlannedWeight

RIVALS = ("linear", "task_arithmetic", "ties")
STORED = "stored"


@dataclass(frozen=True)
class Preservation:
    """The preservation error of one weight.

    Attributes:
        name: the weight.
        method: that merged it, the first in ``error``.
        features: number of features, over all tasks.
        mean_square: mean of σ², the scale of the error: what a merge that answers no feature
            at all would have.
        error: mean of ``|⟨σu, M̄v − σu⟩|`` over all features of all tasks, by method.
    """

    name: str
    method: str
    features: int
    mean_square: float
    error: dict[str, float]


@dataclass(frozen=True)
class TaskFeatures:
    """The features of one task in float64: ``U`` (m×r), ``s`` (r) and ``Vh`` (r×n)."""

    U: torch.Tensor
    s: torch.Tensor
    Vh: torch.Tensor

    def errors(self, merged: torch.Tensor) -> torch.Tensor:
        """Return ``σ_k |u_kᵀ M̄ v_k − σ_k|`` for each k, given M̄ (m×n) in float64."""
        response = ((merged @ self.Vh.mT) * self.U).sum(dim=0)
        return self.s * (response - self.s).abs()


def measure_preservation(
    weight: PlannedWeight, written: torch.Tensor | None = None, device: str = "cpu"
) -> Preservation:
    """Measure one weight for its own method and, on the same inputs, for methods of the host.

    A rival is what the host makes of the same recipe with its method changed and λ = 1.

    Args:
        weight: a linear map that its method merges, one matrix, a stack or a fused projection.
        written: the weight as the merge wrote it, to measure what storing it rounded off.
        device: where to compute.
    """
    base = _load(weight, weight.base, device)
    tuned = [_load(weight, model, device) for model in weight.models]
    job, compute = weight.job(base, tuned), torch.promote_types(weight.dtype, torch.float32)
    merged = {weight.method: _whole(merge_matrix(job).M)}
    for name in RIVALS:
        merged[name] = _merge_by_host(
            name, base.to(compute), [P.to(compute) for P in tuned], weight
        )
    if written is not None and weight.shared["lambda"]:
        merged[STORED] = (written.to(device).double() - base.double()) / weight.shared["lambda"]
    rank = weight.options.get("rank", 1.0)
    measured = [
        _measure_matrix(
            [_decompose(_whole(M), rank) for M in form_differences(job, index)],
            {name: M[index] for name, M in merged.items()},
            weight,
        )
        for index, _ in locate_parts(weight.name, base.shape, job.split, job.is_whole)
    ]
    return _average(measured)


def _whole(M: torch.Tensor | LowRank) -> torch.Tensor:
    return (M.dense() if isinstance(M, LowRank) else M).double()


def _load(weight: PlannedWeight, model: ModelReference, device: str) -> torch.Tensor:
    tensor = weight.load(model)
    if tensor is None:
        raise STFError(f"{model} has no tensor {weight.name!r}, which the merge needs")
    return tensor.to(device)


def _merge_by_host(
    name: str, base: torch.Tensor, tuned: Sequence[torch.Tensor], weight: PlannedWeight
) -> torch.Tensor:
    if name == "linear":
        merged = merge_tensors(tuned, name, parameters={"weight": list(weight.weight)})
    else:
        parameters = {"weight": list(weight.weight), "lambda": 1.0}
        if name == "ties":
            parameters["density"] = list(weight.density)
        merged = merge_tensors([base, *tuned], name, parameters=parameters, base_index=0)
    M: torch.Tensor = merged.double() - base.double()
    return M


def _measure_matrix(
    features: Sequence[TaskFeatures], merged: dict[str, torch.Tensor], weight: PlannedWeight
) -> Preservation:
    total = sum(task.s.numel() for task in features)
    squares = sum(float(task.s.square().sum()) for task in features)
    errors = {
        method: sum(float(task.errors(M).sum()) for task in features) / max(1, total)
        for method, M in merged.items()
    }
    return Preservation(weight.name, weight.method, total, squares / max(1, total), errors)


def _decompose(delta: torch.Tensor, rank: float) -> TaskFeatures:
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    kept = kept_rank((delta.shape[0], delta.shape[1]), rank)
    count = min(kept, int(torch.count_nonzero(s > RANK * s[0])))
    return TaskFeatures(U[:, :count], s[:count], Vh[:count])


def _average(parts: list[Preservation]) -> Preservation:
    """Average the matrices of one weight, each feature counting once."""
    total = sum(part.features for part in parts)
    share = [part.features / max(1, total) for part in parts]
    return Preservation(
        parts[0].name,
        parts[0].method,
        total,
        sum(w * part.mean_square for w, part in zip(share, parts, strict=True)),
        {
            method: sum(w * part.error[method] for w, part in zip(share, parts, strict=True))
            for method in parts[0].error
        },
    )
