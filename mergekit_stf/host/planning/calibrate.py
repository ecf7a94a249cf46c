"""How long this device takes for a weight: the method itself, on random weights of that shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_stf.host.merging.tasks import ordered
from mergekit_stf.host.merging.weights import added, check_values, superposed
from mergekit_stf.host.planning.planned import PlannedWeight

EXPONENT = 3.0
"""Time grows with the cube of the side for a decomposition, until something smaller dominates."""

_SMALLEST = 256
"""Side of the first run of a kind; on smaller matrices what takes the time is something else."""

_REPEATS = 5


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
    budget, a smaller one is measured and scaled up. What is left of the budget goes into
    repetitions, of which the median counts.

    Args:
        kinds: what to measure; one that is there more than once takes no more time.
        device: where.
        budget: seconds for all kinds together, kept roughly.
    """
    end = time.perf_counter() + budget
    order = sorted(set(kinds), key=lambda kind: -kind.operations)
    if order:
        _run(order[0], _first_side(order[0]), device)  # libraries load on their first call
    sides: dict[Kind, int] = {}
    times: dict[Kind, list[float]] = {}
    for kind in order:
        left = max(0.0, end - time.perf_counter())
        sides[kind], first = _measure(kind, device, left / 2)
        times[kind] = [first]
    for kind in order * (_REPEATS - 1):
        if time.perf_counter() + times[kind][0] <= end:
            times[kind].append(_run(kind, sides[kind], device))
    return {
        kind: kind.stack
        * statistics.median(times[kind])
        * (kind.sides[0] / sides[kind]) ** _exponent(kind)
        for kind in order
    }


def _first_side(kind: Kind) -> int:
    return min(_SMALLEST, kind.sides[0])


def _exponent(kind: Kind) -> float:
    return EXPONENT if kind.rule == "superpose" else 1.0


def _measure(kind: Kind, device: torch.device, budget: float) -> tuple[int, float]:
    """Double the side until it is whole or the next step would overrun the budget.

    Returns:
        The last side and its seconds; at most what the side before lets expect, so that a pause
        of the machine does not count.
    """
    whole, side, exponent = kind.sides[0], _first_side(kind), _exponent(kind)
    started = time.perf_counter()
    seconds = min(_run(kind, side, device), _run(kind, side, device))
    while side < whole:
        left = budget - (time.perf_counter() - started)
        if seconds * 2**exponent > left:
            break
        before = side
        side = whole if seconds * (whole / side) ** exponent <= left else min(2 * side, whole)
        seconds = min(_run(kind, side, device), seconds * (side / before) ** exponent)
    return side, seconds


def _run(kind: Kind, side: int, device: torch.device) -> float:
    """Merge one random matrix whose larger side is ``side`` and return the seconds."""
    group = _group(kind, side, device)
    parameters = {"rank": _rank(kind, side), "ridge": kind.ridge, "split": "none"}
    labels = [entry.id for entry in group.non_base]
    started = _now(device)
    tasks = ordered(
        group,
        dict(zip(labels, kind.weights, strict=True)),
        dict(zip(labels, kind.densities, strict=True)),
    )
    base, compute = group.base.tensor, torch.promote_types(kind.dtype, torch.float32)
    check_values("calibration", base, tasks)
    if kind.rule == "superpose":
        M, _ = superposed("calibration", base, tasks, compute, parameters)
    else:
        M = added(base, tasks, compute)
    torch.add(base.to(compute), M)
    return _now(device) - started


def _rank(kind: Kind, side: int) -> float:
    """Return the rank for a matrix of that side; a number of features shrinks as the side does."""
    return kind.rank if kind.rank <= 1 else max(2.0, round(kind.rank * side / kind.sides[0]))


def _group(kind: Kind, side: int, device: torch.device) -> TensorGroup:
    """Return a base and tuned matrices that differ as checkpoints do.

    Their differences are a tenth of the base: strong features, an eighth of the rank, in noise.
    """
    scale = side / kind.sides[0]
    columns = max(1, round(kind.sides[1] * scale)) if kind.sides[1] > 1 else 1
    strong = max(1, columns // 8)
    generator = torch.Generator(device).manual_seed(0)

    def noise(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    base = 0.02 * noise(side, columns)
    tuned = [
        base
        + 0.002 * noise(side, columns)
        + 0.001 * noise(side, strong) @ noise(strong, columns) / strong**0.5
        for _ in kind.weights
    ]
    tensors = [tensor.to(kind.dtype) for tensor in (base, *tuned)]
    return TensorGroup.from_tensors(tensors, base_index=0, name="calibration")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
