"""How long this device takes for a weight: the method itself, on random weights of that shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_stf.host.method import merge, superposed
from mergekit_stf.host.planned import PlannedWeight
from mergekit_stf.host.tasks import check_finite, ordered

EXPONENT = 3.0
"""Time grows with the cube of the side for a decomposition, until something smaller dominates."""

_SMALLEST = 64


@dataclass(frozen=True)
class Kind:
    """What decides the time of a weight.

    Attributes:
        rule: that merges it.
        stack: matrices in it, 1 but for experts and fused projections; smaller ones count by
            their work.
        sides: rows and columns of the largest, the larger first; a vector has one column.
        dtype: of the inputs.
        weights: the scale of each task.
        densities: the fraction that trimming keeps, for each task.
        rank: the leading features that are kept.
        ridge: of the solve.
    """

    rule: str
    stack: float
    sides: tuple[int, int]
    dtype: torch.dtype
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    rank: float
    ridge: float | str

    @property
    def numel(self) -> float:
        """Entries of the whole weight."""
        return self.stack * self.sides[0] * self.sides[1]

    @property
    def operations(self) -> float:
        """A measure of the work, to compare kinds with each other."""
        share = self.sides[1] if self.rule == "superpose" else 1
        return self.numel * share * len(self.weights)


def kind_of(weight: PlannedWeight) -> Kind:
    """Return the kind of a weight of a plan."""
    sides, stack = (weight.numel, 1), 1.0
    if weight.rule == "superpose":
        hollow = torch.empty(weight.header.shape, device="meta")
        shapes = [(max(piece.shape), min(piece.shape)) for piece in weight.pieces(hollow)]
        work = [rows * columns**2 for rows, columns in shapes]
        sides, stack = shapes[work.index(max(work))], sum(work) / max(work)
    return Kind(
        rule=weight.rule,
        stack=stack,
        sides=sides,
        dtype=weight.dtype,
        weights=weight.weight,
        densities=weight.density,
        rank=weight.shared["rank"],
        ridge=weight.shared["ridge"],
    )


def measure_kinds(
    kinds: Sequence[Kind], device: torch.device, budget: float = 2.0
) -> dict[Kind, float]:
    """Return seconds for one weight of each kind.

    The costliest kinds are measured first and largest; where the full size does not fit into the
    budget, a smaller one is measured and scaled up.

    Args:
        kinds: what to measure.
        device: where.
        budget: seconds for all kinds together, kept roughly.
    """
    order = sorted(set(kinds), key=lambda kind: -kind.operations)
    if order:
        _run(order[0], _SMALLEST, device)  # libraries load and warm up on their first call
    measured = {}
    for kind in order:
        started = time.perf_counter()
        measured[kind] = kind.stack * _measure(kind, device, budget / 2)
        budget = max(0.0, budget - (time.perf_counter() - started))
    return measured


def _measure(kind: Kind, device: torch.device, budget: float) -> float:
    """Double the side until it is whole or the next step would overrun the budget."""
    side = min(_SMALLEST, kind.sides[0])
    seconds = _run(kind, side, device)
    spent, exponent = seconds, EXPONENT if kind.rule == "superpose" else 1.0
    while side < kind.sides[0] and spent + seconds * 2**exponent <= budget:
        larger = min(2 * side, kind.sides[0])
        if spent + seconds * (kind.sides[0] / side) ** exponent <= budget:
            larger = kind.sides[0]
        side, seconds = larger, _run(kind, larger, device)
        spent += seconds
    return float(seconds * (kind.sides[0] / side) ** exponent)


def _run(kind: Kind, side: int, device: torch.device) -> float:
    """Merge one random matrix whose larger side is ``side`` and return the seconds."""
    group = _group(kind, side, device)
    parameters = {"rank": kind.rank, "ridge": kind.ridge, "lambda": 1.0, "split": "none"}
    labels = [entry.id for entry in group.non_base]
    started = _now(device)
    tasks = ordered(
        group,
        dict(zip(labels, kind.weights, strict=True)),
        dict(zip(labels, kind.densities, strict=True)),
    )
    base = group.base.tensor
    check_finite("calibration", [("base", base), *((task.label, task.tuned) for task in tasks)])
    if kind.rule == "superpose":
        compute = torch.promote_types(kind.dtype, torch.float32)
        superposed("calibration", base, tasks, compute, parameters)
    else:
        merge("calibration", base, tasks, kind.rule, parameters)
    return _now(device) - started


def _group(kind: Kind, side: int, device: torch.device) -> TensorGroup:
    """Return a base and tuned matrices whose differences have a decaying spectrum."""
    scale = side / kind.sides[0]
    columns = max(1, round(kind.sides[1] * scale)) if kind.sides[1] > 1 else 1
    generator = torch.Generator(device).manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(side, columns, generator=generator, device=device)

    base = noise()
    decay = torch.arange(1, columns + 1, device=device) ** -0.5
    tuned = [base + 0.1 * noise() * decay for _ in kind.weights]
    tensors = [tensor.to(kind.dtype) for tensor in (base, *tuned)]
    return TensorGroup.from_tensors(tensors, base_index=0, name="calibration")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
