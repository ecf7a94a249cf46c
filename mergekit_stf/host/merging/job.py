"""One weight of a merge as a value: what goes in, what comes out, and the pure functions between.

``merge_matrix`` computes what is added to the base, before lambda, which the store can keep;
``finish`` adds it to the base and rounds once. ``merge_weight`` is both. None of them remembers
anything: whoever runs jobs (``desk``) owns the store, the records and the warnings.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core import LowRank, Merged, Record, methods
from mergekit_stf.core.calibration import calibrate
from mergekit_stf.core.methods import Kind, Method
from mergekit_stf.core.methods.method import BASE, MEAN, MERGE
from mergekit_stf.core.precision import full_precision
from mergekit_stf.host.checkpoints.content import same_bits
from mergekit_stf.host.checkpoints.stored import StoredTensor, as_tensor
from mergekit_stf.host.diagnostics.notices import Notice, find_ill_posed
from mergekit_stf.host.merging.differences import sum_differences, task_matrices
from mergekit_stf.host.merging.finite import check_finite, check_type, copy_weight, round_weight
from mergekit_stf.host.merging.parts import Assembly, add_to_base, locate_parts
from mergekit_stf.host.merging.records import join_records
from mergekit_stf.host.merging.split import Split


@dataclass(frozen=True)
class Task:
    """What one model does to one weight.

    At most one of ``tuned`` and ``delta`` is set; where neither is, the model leaves the weight as
    it is.

    Attributes:
        label: the model, as errors and records name it.
        tuned: the model's own tensor, from which the base is subtracted.
        delta: the difference to the base itself, whole or in factors.
        weight: scales the difference.
        density: fraction of its entries that trimming keeps.
        squared_distance: of the whole model to the whole base, where the method asks for it.
    """

    label: str
    tuned: Tensor | StoredTensor | None = None
    delta: Tensor | LowRank | None = None
    weight: float = 1.0
    density: float = 1.0
    squared_distance: float | None = None


@dataclass(frozen=True)
class WeightJob:
    """Everything that one merged weight depends on; it can be pickled.

    Attributes:
        name: of the weight.
        kind: what the weight is in its model.
        base: the base's tensor, or where to read it.
        tasks: what each model does to it, in the order in which they are merged.
        method: the name of the merge method.
        options: the method's own options.
        rule: ``auto``, or what the recipe sets for this weight.
        scale: lambda.
        split: where the linear maps of a fused projection lie.
        input_axis: the axis of each linear map that meets the inputs, 1 or 0.
        out_dtype: the type to write, None for that of the base.
        base_model: the base, where it is one of the host's references.
        notices: what is to be said of the inputs.
    """

    name: str
    kind: Kind
    base: Tensor | StoredTensor
    tasks: tuple[Task, ...]
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rule: str = "auto"
    scale: float = 1.0
    split: Split | None = None
    input_axis: int = 1
    out_dtype: torch.dtype | None = None
    base_model: Hashable = None
    notices: tuple[Notice, ...] = ()

    @property
    def resolved_rule(self) -> str:
        """The rule that merges the weight: ``merge``, ``sum``, ``mean`` or ``base``."""
        return resolve_rule(methods.get(self.method), self.kind, self.rule)

    @property
    def is_whole(self) -> bool:
        """Say whether the method merges it as one, whatever its shape."""
        return methods.get(self.method).takes_whole(self.kind)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which differences are formed and merged."""
        return torch.promote_types(self.base.dtype, torch.float32)

    @property
    def written_dtype(self) -> torch.dtype:
        """The type to write."""
        return self.out_dtype or self.base.dtype


@dataclass(frozen=True)
class WeightResult:
    """One merged weight.

    Attributes:
        tensor: its entries, in the type to write.
        record: what was done; None where the base was taken as it is.
        notices: what the user should know.
    """

    tensor: Tensor
    record: Record | None = None
    notices: tuple[Notice, ...] = ()


def resolve_rule(method: Method, kind: Kind, rule: str) -> str:
    """Return what a recipe's rule means for a weight: ``merge``, ``sum``, ``mean`` or ``base``.

    Args:
        method: the merge method.
        kind: of the weight.
        rule: of the recipe; ``auto`` leaves it to the method, ``superpose`` is its own rule.
    """
    if rule == "auto":
        return method.rules[kind]
    return MERGE if rule in (MERGE, "superpose") else rule


def rule_label(method: Method, applied: str) -> str:
    """Return a rule as tables and records call it: the method's own by the method's word for it."""
    return method.own_rule if applied == MERGE else applied


def merge_weight(job: WeightJob) -> WeightResult:
    """Merge one weight: a pure function of its job.

    Raises:
        STFError: what is wrong with the weight, by its name, and what to do.
    """
    job = with_tensors(job)
    if is_copied(job):
        return copy_base(job)
    check_inputs(job)
    return finish(job, merge_matrix(job))


def with_tensors(job: WeightJob) -> WeightJob:
    """Return the job with the tensors that it only named."""
    tasks = tuple(
        task if task.tuned is None else replace(task, tuned=as_tensor(task.tuned))
        for task in job.tasks
    )
    return replace(job, base=as_tensor(job.base), tasks=tasks)


def is_copied(job: WeightJob) -> bool:
    """Say whether the base is written as it is: by the rule, or as no model differs from it."""
    return job.resolved_rule == BASE or is_unchanged(job)


def is_unchanged(job: WeightJob) -> bool:
    """Say whether every model has the bits of the base."""
    return all(
        task.delta is None
        and (task.tuned is None or same_bits(as_tensor(task.tuned), as_tensor(job.base)))
        for task in job.tasks
    )


def copy_base(job: WeightJob) -> WeightResult:
    """Write the base as it is.

    Raises:
        STFError: a model's tensor is not finite, or the base's does not fit into the type to write.
    """
    if not is_unchanged(job):
        check_type(job.name, job.base.dtype)
        check_finite(job.name, _tuned_tensors(job))
    base = as_tensor(job.base)
    tensor, notices = copy_weight(job.name, base, job.written_dtype, job.base_model)
    return WeightResult(tensor, notices=(*job.notices, *notices))


def check_inputs(job: WeightJob) -> None:
    """Refuse types that hold no merged weight, and values that are not finite.

    Raises:
        STFError: with the model and the weight.
    """
    check_type(job.name, job.base.dtype)
    if tuned := _tuned_tensors(job):
        check_finite(job.name, [("base_model", as_tensor(job.base)), *tuned])


def merge_matrix(job: WeightJob) -> Merged:
    """Return what is added to the base, before lambda, in factors where all differences are.

    The experts of a stack, and the maps of a fused projection, are merged one after another.

    Args:
        job: one that passes ``check_inputs``.

    Raises:
        STFError: the shape is not one that the method merges, or ``split`` does not fit it.
    """
    with full_precision(), torch.no_grad():
        if job.resolved_rule != MERGE:
            return Merged(sum_differences(job), Record())
        method, whole, records = methods.get(job.method), Assembly(tuple(job.base.shape)), []
        for index, name in locate_parts(job.name, job.base.shape, job.split, job.is_whole):
            tasks = task_matrices(job, index, name)
            merged = method.merge(tasks, job.options)
            found = calibrate(merged, tasks, job.options.get("calibrate", 0.0))
            whole.put(index, found.M)
            records.append(found.record)
        return Merged(whole.M, join_records(records))


def finish(job: WeightJob, merged: Merged) -> WeightResult:
    """Add ``lambda M`` to the base and round once.

    Raises:
        STFError: an entry of the result is too large for its type.
    """
    blocks = [block.clone() for block in finish_in_blocks(job, merged)]
    tensor = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    record = record_of(job, merged)
    return WeightResult(tensor, record, (*job.notices, *find_ill_posed(record)))


def finish_in_blocks(job: WeightJob, merged: Merged) -> Iterator[Tensor]:
    """Yield the merged weight in blocks of rows, each valid until the next.

    Raises:
        STFError: as ``finish``.
    """
    base = as_tensor(job.base)
    for block in add_to_base(base, merged.M, scale_of(job), job.compute_dtype):
        yield round_weight(job.name, block, job.written_dtype, [("base_model", base)])


def scale_of(job: WeightJob) -> float:
    """Return the factor of M: lambda, or for the rule ``mean`` one over the number of models."""
    return 1 / len(job.tasks) if job.resolved_rule == MEAN else job.scale


def record_of(job: WeightJob, merged: Merged) -> Record:
    """Return the record of a merged weight, without times and memory."""
    return replace(
        merged.record,
        name=job.name,
        method=job.method,
        rule=rule_label(methods.get(job.method), job.resolved_rule),
        shape=tuple(job.base.shape),
        models=tuple(task.label for task in job.tasks),
    )


def _tuned_tensors(job: WeightJob) -> list[tuple[str, Tensor]]:
    return [(task.label, as_tensor(task.tuned)) for task in job.tasks if task.tuned is not None]
