"""Merge what several adapters do to one weight, in factors wherever the recipe allows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.lowrank import LowRank, sum_of, superpose_factors
from mergekit_stf.core.trim import trim
from mergekit_stf.host.adapter_plan import AdapterPlan, Change, TouchedWeight
from mergekit_stf.host.notices import NEAR_DUPLICATE
from mergekit_stf.host.tasks import check_finite, check_type

Delta = LowRank | Tensor


class AdapterMerger:
    """Merges weight by weight, and remembers which systems were ill-posed.

    Args:
        plan: what the adapters change.

    Attributes:
        damped: for each weight whose system was damped, the pairs of near-duplicate adapters.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        self.plan = plan
        self.damped: dict[str, list[tuple[str, str]]] = {}

    def delta(self, stored: str, base: Callable[[], Tensor]) -> Delta | None:
        """Return what is added to a weight, with lambda in it; None where nothing is.

        A low-rank update without trimming stays in its factors. Trimming needs the whole matrix,
        and so does a weight that an adapter stores as a whole.

        Args:
            stored: the weight's name in the base's checkpoint.
            base: reads its tensor; called only where the difference to it is needed.

        Raises:
            STFError: a stack of experts, or values that are not finite.
        """
        weight = self.plan.touched.get(stored)
        if weight is None or weight.planned.rule == "base":
            return None
        planned, tasks = weight.planned, dict(_tasks(weight, base))
        if planned.rule == "mean":
            return _sum([*tasks.values()], 1 / len(planned.models))
        scale = float(planned.shared["lambda"])
        if planned.rule == "sum":
            return _sum([*tasks.values()], scale)
        return self._superposed(tasks, weight).scaled(scale)

    def pieces(self, stored: str, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a weight of the merged model, in blocks of rows, each valid until the next.

        It is formed in float32 or better and rounded once.

        Args:
            stored: the weight's name in the base's checkpoint.
            base: its tensor.
            dtype: the type of the result.

        Raises:
            STFError: as `delta`, or the base holds NaN or infinity, or a type that holds no
                merged weight.
        """
        delta = self.delta(stored, lambda: base)
        if delta is None:
            yield base.to(dtype)
            return
        check_type(stored, base.dtype)
        for block in _added(delta, base):
            if not math.isfinite(float(block.sum())):
                check_finite(stored, [("base_model", base)])
            yield block.to(dtype)

    def _superposed(self, tasks: dict[str, Delta], weight: TouchedWeight) -> LowRank:
        planned = weight.planned
        if len(planned.header.shape) != 2:
            raise STFError(
                f"{planned.name}: an adapter replaces a stack of shape {planned.header.shape}, and "
                "only matrices are superposed here; set rule: sum for it, or merge full models"
            )
        rank, ridge = planned.shared["rank"], planned.shared["ridge"]
        found = superpose_factors(
            [*tasks.values()],
            rank=rank,
            ridge=None if ridge == "auto" else float(ridge),
            name=planned.name,
        )
        if found.solution is not None and found.solution.cutoff:
            self.damped[planned.name] = _near_duplicates(tasks)
        return found.M


def _added(delta: Delta, base: Tensor) -> Iterator[Tensor]:
    if isinstance(delta, LowRank):
        yield from delta.added_to(base)
    else:
        compute = torch.promote_types(base.dtype, delta.dtype)
        yield base.to(compute) + delta.to(compute)


def _tasks(weight: TouchedWeight, base: Callable[[], Tensor]) -> Iterator[tuple[str, Delta]]:
    """Yield the task matrices ``w (P_i - P_0)``, trimmed, of the adapters that have one."""
    planned = weight.planned
    settings = zip(weight.changes, planned.weight, planned.density, strict=True)
    for change, factor, density in settings:
        if change is None:
            continue
        if change.factors is not None and density == 1 and _keeps_base(change, base):
            yield change.source, change.factors.scaled(factor)
        else:
            yield change.source, trim(_dense(change, base) * factor, density)


def _keeps_base(change: Change, base: Callable[[], Tensor]) -> bool:
    """Say whether the weight that PEFT stored beside an embedding's factors is the base's own."""
    replaced = change.replaced
    return replaced is None or torch.equal(replaced.double(), base().double())


def _dense(change: Change, base: Callable[[], Tensor]) -> Tensor:
    reference = base()
    compute = torch.promote_types(reference.dtype, torch.float32)
    delta = torch.zeros((), dtype=compute)
    if change.replaced is not None:
        delta = delta + (change.replaced.to(compute) - reference.to(compute))
    if change.factors is not None:
        delta = delta + change.factors.dense().to(compute)
    return delta


def _sum(tasks: list[Delta], scale: float) -> Delta:
    factored = [task for task in tasks if isinstance(task, LowRank)]
    if len(factored) == len(tasks):
        return sum_of(factored).scaled(scale)
    whole = [task.dense() if isinstance(task, LowRank) else task for task in tasks]
    return torch.stack([task.double() for task in whole]).sum(dim=0) * scale


def _near_duplicates(tasks: dict[str, Delta]) -> list[tuple[str, str]]:
    """Return the pairs of adapters whose updates point the same or the opposite way."""
    factors = {source: _as_factors(task) for source, task in tasks.items()}
    return [
        (a, b)
        for a, b in combinations(factors, 2)
        if abs(factors[a].inner(factors[b]))
        >= NEAR_DUPLICATE * max(factors[a].norm * factors[b].norm, 1e-300)
    ]


def _as_factors(task: Delta) -> LowRank:
    if isinstance(task, LowRank):
        return task
    return LowRank(task.double(), torch.eye(task.shape[1], dtype=torch.float64))
