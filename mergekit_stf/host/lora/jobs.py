"""Adapters as jobs: what each does to a weight, in factors wherever the recipe allows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_stf.core import LowRank, Merged, methods
from mergekit_stf.host.checkpoints.stored import StoredTensor, as_tensor
from mergekit_stf.host.lora.plan import AdapterPlan, Change, TouchedWeight
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.merging.finite import copy_weight, is_finite
from mergekit_stf.host.merging.job import Task, WeightJob, finish_in_blocks
from mergekit_stf.host.merging.split import parse_split
from mergekit_stf.host.merging.whole_models import squared_length
from mergekit_stf.host.plugin.groups import input_axis_of

Found = tuple[WeightJob, Merged]
"""A job, and what is added to its base before lambda."""


class AdapterJobs:
    """The weights of a merge of adapters, one after another.

    Args:
        plan: what the adapters change.
        desk: runs the jobs.

    Attributes:
        infinite: the weights that were copied from the base with infinite entries.
    """

    def __init__(self, plan: AdapterPlan, desk: Desk) -> None:
        self.plan, self.desk = plan, desk
        self._distances = measure_distances(plan)
        self.infinite: list[str] = []

    def merge_matrix(self, stored: str, out_dtype: torch.dtype | None = None) -> Found | None:
        """Merge what the adapters do to a weight, None where they do nothing.

        A low-rank update without trimming stays in its factors. Trimming needs the whole matrix,
        and so does a weight that an adapter stores as a whole.

        Args:
            stored: the weight's name in the base's checkpoint.
            out_dtype: the type to write.

        Raises:
            STFError: as ``merge_matrix``.
        """
        weight = self.plan.touched.get(stored)
        if weight is None or weight.planned.rule == "base":
            return None
        job = make_adapter_job(self.plan, weight, stored, out_dtype, self._distances)
        return job, self.desk.merge_matrix(job)

    def finish_in_blocks(
        self, stored: str, found: Found | None, base: Tensor, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield a weight of the merged model, in blocks of rows, each valid until the next.

        Args:
            stored: the weight's name in the base's checkpoint.
            found: what ``merge_matrix`` has returned for it.
            base: its tensor.
            dtype: the type of the result.

        Raises:
            STFError: the base holds NaN or infinity, or an entry of the result is too large for its
                type.
        """
        if found is not None:
            yield from finish_in_blocks(*found)
            return
        tensor, notices = copy_weight(stored, base, dtype, self.plan.base)
        self.desk.notices.say(notices)
        if not is_finite(tensor):
            self.infinite.append(stored)
        yield tensor


def make_adapter_job(
    plan: AdapterPlan,
    weight: TouchedWeight,
    stored: str,
    out_dtype: torch.dtype | None,
    distances: Sequence[float | None],
) -> WeightJob:
    """Return the job of a weight that adapters touch, its tasks in the order of the recipe.

    Args:
        plan: what the adapters change.
        weight: the weight.
        stored: its name in the base's checkpoint.
        out_dtype: the type to write.
        distances: of ``measure_distances``.
    """
    planned, base = weight.planned, _base(plan, stored)
    settings = zip(
        plan.adapters, weight.changes, planned.weight, planned.density, distances, strict=True
    )
    return WeightJob(
        name=planned.name,
        kind=planned.kind,
        base=base,
        tasks=tuple(
            replace(
                _task(adapter.source, change, base),
                weight=factor,
                density=density,
                squared_distance=distance,
            )
            for adapter, change, factor, density, distance in settings
        ),
        method=planned.method,
        options=planned.options,
        rule=planned.shared["rule"],
        scale=float(planned.shared["lambda"]),
        split=parse_split(planned.shared["split"]),
        input_axis=input_axis_of(methods.get(planned.method), planned.options, plan.base, stored),
        out_dtype=out_dtype,
        base_model=plan.base,
    )


def measure_distances(plan: AdapterPlan) -> tuple[float | None, ...]:
    """Return what each adapter adds to the base as a whole, ``Σ |ΔP|²``, from factors where it can.

    It is None for each where the method does not ask for it.
    """
    asks = any(methods.get(w.planned.method).whole_models for w in plan.touched.values())
    if not asks:
        return (None,) * len(plan.adapters)
    return tuple(
        math.fsum(
            _square(_task(adapter.source, weight.changes[number], base), base)
            for weight, base in ((w, _base(plan, name)) for name, w in plan.touched.items())
        )
        for number, adapter in enumerate(plan.adapters)
    )


def _square(task: Task, base: StoredTensor) -> float:
    """Return ``|ΔP|²`` of one weight; with nothing changed it is 0."""
    if isinstance(task.delta, LowRank):
        return task.delta.inner(task.delta)
    if task.delta is not None:
        return squared_length(task.delta)
    if task.tuned is None:
        return 0.0
    compute = torch.promote_types(base.dtype, torch.float32)
    return squared_length(as_tensor(task.tuned).to(compute) - base.load().to(compute))


def _base(plan: AdapterPlan, stored: str) -> StoredTensor:
    header = plan.touched[stored].planned.header
    return StoredTensor(plan.base, stored, header.shape, header.dtype)


def _task(source: str, change: Change | None, base: StoredTensor) -> Task:
    if change is None:
        return Task(source)
    if change.factors is None:
        return Task(source, tuned=change.replaced)
    return Task(source, delta=change.factors if _keeps_base(change, base) else _whole(change, base))


def _keeps_base(change: Change, base: StoredTensor) -> bool:
    """Say whether the weight that PEFT stored beside an embedding's factors is the base's own."""
    replaced = change.replaced
    return replaced is None or torch.equal(replaced.double(), base.load().double())


def _whole(change: Change, base: StoredTensor) -> Tensor:
    """Return the difference that a stored weight and factors make together."""
    compute = torch.promote_types(base.dtype, torch.float32)
    delta = torch.zeros((), dtype=compute)
    if change.replaced is not None:
        delta = change.replaced.to(compute) - base.load().to(compute)
    if change.factors is not None:
        delta = delta + change.factors.dense().to(compute)
    return delta
