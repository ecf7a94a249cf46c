"""Adapters as jobs: what each does to a weight, in factors wherever the recipe allows it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_stf.core import Merged, methods
from mergekit_stf.host.checkpoints.stored import StoredTensor
from mergekit_stf.host.lora.plan import AdapterPlan, Change, TouchedWeight
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.merging.finite import copy_weight, is_finite
from mergekit_stf.host.merging.job import Task, WeightJob, finish_in_blocks
from mergekit_stf.host.merging.split import parse_split
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
        job = make_adapter_job(self.plan, weight, stored, out_dtype)
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
    plan: AdapterPlan, weight: TouchedWeight, stored: str, out_dtype: torch.dtype | None
) -> WeightJob:
    """Return the job of a weight that adapters touch, its tasks in the order of the recipe.

    Args:
        plan: what the adapters change.
        weight: the weight.
        stored: its name in the base's checkpoint.
        out_dtype: the type to write.
    """
    planned = weight.planned
    base = StoredTensor(plan.base, stored, planned.header.shape, planned.header.dtype)
    settings = zip(plan.adapters, weight.changes, planned.weight, planned.density, strict=True)
    return WeightJob(
        name=planned.name,
        kind=planned.kind,
        base=base,
        tasks=tuple(
            _task(adapter.source, change, base, factor, density)
            for adapter, change, factor, density in settings
        ),
        method=planned.method,
        options=planned.options,
        rule=planned.shared["rule"],
        scale=float(planned.shared["lambda"]),
        split=parse_split(planned.shared["split"]),
        input_axis=input_axis_of(methods.get(planned.method), plan.base, stored),
        out_dtype=out_dtype,
        base_model=plan.base,
    )


def _task(
    source: str, change: Change | None, base: StoredTensor, weight: float, density: float
) -> Task:
    if change is None:
        return Task(source)
    if change.factors is None:
        return Task(source, tuned=change.replaced, weight=weight, density=density)
    delta = change.factors if _keeps_base(change, base) else _whole(change, base)
    return Task(source, delta=delta, weight=weight, density=density)


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
