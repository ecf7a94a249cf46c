"""How long this device takes for a weight: the method itself, on random weights of that shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_stf.core import methods
from mergekit_stf.core.methods import Kind
from mergekit_stf.core.methods.method import MERGE
from mergekit_stf.host.merging.job import Task, WeightJob, merge_weight
from mergekit_stf.host.planning.planned import PlannedWeight

EXPONENT = 3.0
"""Time grows with the cube of the side for a decomposition, until something smaller dominates."""

_SMALLEST = 256
"""Side of the first run of a workload; on smaller ones what takes the time is something else."""

_REPEATS = 5


@dataclass(frozen=True)
class Workload:
    """What decides the time of a weight.

    Attributes:
        rule: that merges it, as ``WeightJob.resolved_rule`` has it.
        method: the merge method.
        options: the method's own options, by name.
        stack: matrices in it, 1 but for experts and fused projections; smaller ones count by
            their work.
        sides: rows and columns of the largest, the larger first; a vector has one column.
        dtype: of the inputs.
        weights: the scale of each task.
        densities: the fraction that trimming keeps, for each task.
    """

    rule: str
    method: str
    options: tuple[tuple[str, Any], ...]
    stack: float
    sides: tuple[int, int]
    dtype: torch.dtype
    weights: tuple[float, ...]
    densities: tuple[float, ...]

    @property
    def numel(self) -> float:
        """Entries of the whole weight."""
        return self.stack * self.sides[0] * self.sides[1]

    @property
    def operations(self) -> float:
        """A measure of the work, to compare workloads with each other."""
        share = self.sides[1] if self.decomposes else 1
        return self.numel * share * len(self.weights)

    @property
    def decomposes(self) -> bool:
        """Say whether the work grows with the sides of a matrix, and not with its entries alone."""
        return self.rule == MERGE and not methods.get(self.method).elementwise


def workload_of(weight: PlannedWeight) -> Workload:
    """Return the workload of a weight of a plan."""
    sides, stack = (weight.numel, 1), 1.0
    if weight.resolved_rule == MERGE and not methods.get(weight.method).elementwise:
        hollow = torch.empty(weight.header.shape, device="meta")
        shapes = [(max(piece.shape), min(piece.shape)) for piece in weight.split_tensor(hollow)]
        work = [rows * columns**2 for rows, columns in shapes]
        sides, stack = shapes[work.index(max(work))], sum(work) / max(work)
    return Workload(
        rule=weight.resolved_rule,
        method=weight.method,
        options=tuple(sorted(weight.options.items())),
        stack=stack,
        sides=sides,
        dtype=weight.dtype,
        weights=weight.weight,
        densities=weight.density,
    )


def time_workloads(
    workloads: Sequence[Workload], device: torch.device, budget: float = 2.0
) -> dict[Workload, float]:
    """Return seconds for one weight of each workload.

    The costliest are measured first and largest; where the full size does not fit into the budget,
    a smaller one is measured and scaled up. What is left of the budget goes into
    repetitions, of which the median counts.

    Args:
        workloads: what to measure; one that is there more than once takes no more time.
        device: where.
        budget: seconds for all workloads together, kept roughly.
    """
    end = time.perf_counter() + budget
    order = sorted(set(workloads), key=lambda workload: -workload.operations)
    if order:
        _run(order[0], _first_side(order[0]), device)  # libraries load on their first call
    sides: dict[Workload, int] = {}
    times: dict[Workload, list[float]] = {}
    for workload in order:
        left = max(0.0, end - time.perf_counter())
        sides[workload], first = _measure(workload, device, left / 2)
        times[workload] = [first]
    for workload in order * (_REPEATS - 1):
        if time.perf_counter() + times[workload][0] <= end:
            times[workload].append(_run(workload, sides[workload], device))
    return {
        workload: workload.stack
        * statistics.median(times[workload])
        * (workload.sides[0] / sides[workload]) ** _exponent(workload)
        for workload in order
    }


def _first_side(workload: Workload) -> int:
    return min(_SMALLEST, workload.sides[0])


def _exponent(workload: Workload) -> float:
    return EXPONENT if workload.decomposes else 1.0


def _measure(workload: Workload, device: torch.device, budget: float) -> tuple[int, float]:
    """Double the side until it is whole or the next step would overrun the budget.

    Returns:
        The last side and its seconds; at most what the side before lets expect, so that a pause
        of the machine does not count.
    """
    whole, side, exponent = workload.sides[0], _first_side(workload), _exponent(workload)
    started = time.perf_counter()
    seconds = min(_run(workload, side, device), _run(workload, side, device))
    while side < whole:
        left = budget - (time.perf_counter() - started)
        if seconds * 2**exponent > left:
            break
        before = side
        side = whole if seconds * (whole / side) ** exponent <= left else min(2 * side, whole)
        seconds = min(_run(workload, side, device), seconds * (side / before) ** exponent)
    return side, seconds


def _run(workload: Workload, side: int, device: torch.device) -> float:
    """Merge one random weight whose larger side is ``side`` and return the seconds."""
    job = _job(workload, side, device)
    started = _now(device)
    merge_weight(job)
    return _now(device) - started


def _options(workload: Workload, side: int) -> dict[str, Any]:
    """Return the options for a matrix of that side; a number of features shrinks as it does."""
    options = dict(workload.options)
    rank = options.get("rank", 1.0)
    if rank > 1:
        options["rank"] = max(2.0, round(rank * side / workload.sides[0]))
    return options


def _job(workload: Workload, side: int, device: torch.device) -> WeightJob:
    """Return the merge of a base and tuned matrices that differ as checkpoints do.

    Their differences are a tenth of the base: strong features, an eighth of the rank, in noise.
    """
    scale = side / workload.sides[0]
    columns = max(1, round(workload.sides[1] * scale)) if workload.sides[1] > 1 else 1
    strong = max(1, columns // 8)
    generator = torch.Generator(device).manual_seed(0)

    def noise(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    base = 0.02 * noise(side, columns)
    tuned = [
        base
        + 0.002 * noise(side, columns)
        + 0.001 * noise(side, strong) @ noise(strong, columns) / strong**0.5
        for _ in workload.weights
    ]
    settings = zip(tuned, workload.weights, workload.densities, strict=True)
    return WeightJob(
        name="calibration",
        kind=Kind.LINEAR,
        base=base.to(workload.dtype),
        tasks=tuple(
            Task(str(number), one.to(workload.dtype), None, weight, density, squared_distance=1.0)
            for number, (one, weight, density) in enumerate(settings)
        ),
        method=workload.method,
        options=_options(workload, side),
        rule=workload.rule,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
