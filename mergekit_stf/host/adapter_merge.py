"""Merge what several adapters do to one weight, in factors wherever the recipe allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.lowrank import LowRank, sum_of, superpose_factors
from mergekit_stf.core.trim import trim
from mergekit_stf.host.adapter_plan import Change, TouchedWeight

Delta = LowRank | Tensor


def merge_weight(weight: TouchedWeight, base: Callable[[], Tensor]) -> Delta | None:
    """Return what is added to the base's weight, with lambda in it; None where nothing is.

    A low-rank update without trimming stays in its factors. Trimming needs the whole matrix, and
    so does a weight that the adapter stores as a whole.

    Args:
        weight: the weight and what each adapter does to it.
        base: reads the base's tensor; called only where the difference to it is needed.

    Raises:
        STFError: a stack of experts, whose adapters cannot be merged.
    """
    planned = weight.planned
    tasks = [*_tasks(weight, base)] if planned.rule != "base" else []
    if not tasks:
        return None
    if planned.rule == "mean":
        return _sum(tasks, 1 / len(planned.models))
    scale = float(planned.shared["lambda"])
    if planned.rule == "sum":
        return _sum(tasks, scale)
    return _superposed(tasks, weight).scaled(scale)


def _tasks(weight: TouchedWeight, base: Callable[[], Tensor]) -> Iterator[Delta]:
    """Yield the task matrices ``w (P_i - P_0)``, trimmed, of the adapters that have one."""
    planned = weight.planned
    for change, factor, density in zip(
        weight.changes, planned.weight, planned.density, strict=True
    ):
        if change is None:
            continue
        if change.factors is not None and density == 1 and _keeps_base(change, base):
            yield change.factors.scaled(factor)
        else:
            yield trim(_dense(change, base) * factor, density)


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


def _superposed(tasks: list[Delta], weight: TouchedWeight) -> LowRank:
    planned = weight.planned
    if len(planned.header.shape) != 2:
        raise STFError(
            f"{planned.name}: an adapter replaces a stack of {planned.header.shape}, and only "
            "matrices are superposed here; set rule: sum for it, or merge full models"
        )
    rank, ridge = planned.shared["rank"], planned.shared["ridge"]
    return superpose_factors(
        tasks, rank=rank, ridge=None if ridge == "auto" else float(ridge), name=planned.name
    )
