"""The task matrices of one weight, in factors wherever the recipe allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_stf.core.lowrank import Index, LowRank
from mergekit_stf.core.trim import trim
from mergekit_stf.host.lora.plan import Change, TouchedWeight

Delta = LowRank | Tensor


@dataclass(frozen=True)
class AdapterTask:
    """What one adapter adds to one weight.

    Attributes:
        source: the adapter.
        delta: ``w (P_i - P_0)``, not trimmed.
        density: fraction of its entries that trimming keeps.
        compute: the type in which a whole matrix is merged.
    """

    source: str
    delta: Delta
    density: float
    compute: torch.dtype

    @property
    def trimmed(self) -> Delta:
        """The task matrix as it is merged: in factors unless entries are trimmed."""
        if self.density == 1 or (isinstance(self.delta, LowRank) and not self.delta.rank):
            return self.delta
        whole = self.delta.dense() if isinstance(self.delta, LowRank) else self.delta
        return trim(whole.to(self.compute), self.density)

    def part(self, index: Index) -> AdapterTask:
        """Return the task of the linear map at an index of a fused projection."""
        delta = self.delta
        part = delta.part(index) if isinstance(delta, LowRank) else delta[index]
        return replace(self, delta=part)


def tasks_of(weight: TouchedWeight, base: Callable[[], Tensor]) -> list[AdapterTask]:
    """Return the tasks of a weight in the order of the recipe.

    An adapter that does not touch a matrix has a zero task of rank 0 there; one that does not
    touch another weight has none.

    Args:
        weight: the weight.
        base: reads its tensor; called only where the difference to it is needed.
    """
    planned = weight.planned
    compute = torch.promote_types(planned.header.dtype, torch.float32)
    settings = zip(planned.models, weight.changes, planned.weight, planned.density, strict=True)
    tasks = []
    for model, change, factor, density in settings:
        if change is not None:
            delta = _delta(change, factor, compute, base)
            tasks.append(AdapterTask(change.source, delta, density, compute))
        elif len(planned.header.shape) == 2:
            tasks.append(AdapterTask(str(model), _zero(planned.header.shape), 1.0, compute))
    return tasks


def _delta(
    change: Change, factor: float, compute: torch.dtype, base: Callable[[], Tensor]
) -> Delta:
    if change.factors is not None and _keeps_base(change, base):
        return change.factors.scaled(factor)
    delta = torch.zeros((), dtype=compute)
    if change.replaced is not None:
        delta = delta + (change.replaced.to(compute) - base().to(compute))
    if change.factors is not None:
        delta = delta + change.factors.dense().to(compute)
    return delta * factor


def _keeps_base(change: Change, base: Callable[[], Tensor]) -> bool:
    """Say whether the weight that PEFT stored beside an embedding's factors is the base's own."""
    replaced = change.replaced
    return replaced is None or torch.equal(replaced.double(), base().double())


def _zero(shape: tuple[int, ...]) -> LowRank:
    m, n = shape
    empty = torch.zeros(m, 0, dtype=torch.float64)
    return LowRank(empty, empty.new_zeros(0, n))
