"""From a job to its task matrices, ``w_i (P_i - P_0)``, trimmed (STF paper, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_stf.core import LowRank, TaskMatrices, trim
from mergekit_stf.core.low_rank import sum_of
from mergekit_stf.host.checkpoints.stored import as_tensor
from mergekit_stf.host.merging.parts import Index, matrix_shape, part_shape, take_part

if TYPE_CHECKING:
    from mergekit_stf.host.merging.job import Task, WeightJob


def form_differences(job: WeightJob, index: Index = ()) -> Iterator[Tensor | LowRank]:
    """Yield each model's difference to the base, one at a time (Algorithm 2, lines 4 and 5).

    Args:
        job: the weight.
        index: of the part that is wanted.
    """
    reference: Tensor | None = None
    for task in job.tasks:
        if task.tuned is not None:
            if reference is None:
                reference = as_tensor(job.base)[index].to(job.compute_dtype)
            delta = as_tensor(task.tuned)[index] - reference
            if task.weight != 1:
                delta.mul_(task.weight)
            yield trim(delta, task.density)
        elif task.delta is not None:
            yield _trim_known(take_part(task.delta, index), task, job.compute_dtype)
        elif len(shape := part_shape(job.base.shape, index)) == 2:
            yield _zero(shape)
        else:
            yield torch.zeros(shape, dtype=job.compute_dtype, device=job.base.device)


def task_matrices(job: WeightJob, index: Index, name: str) -> TaskMatrices:
    """Return the task matrices of a part, which is a matrix or is merged as one.

    Args:
        job: the weight.
        index: of the part in it.
        name: of the part, for messages.
    """
    factored = all(
        task.tuned is None
        and not isinstance(task.delta, Tensor)
        and (task.density == 1 or task.delta is None)
        for task in job.tasks
    )
    shape = matrix_shape(part_shape(job.base.shape, index))

    def read() -> Iterator[Tensor | LowRank]:
        for M in form_differences(job, index):
            yield M.reshape(shape) if isinstance(M, Tensor) else M

    return TaskMatrices(
        read=read,
        shape=shape,
        count=len(job.tasks),
        device=job.base.device,
        dtype=job.compute_dtype,
        factored=factored,
        source_dtype=job.base.dtype,
        name=name,
        input_axis=job.input_axis,
        squared_distances=tuple(
            task.squared_distance for task in job.tasks if task.squared_distance is not None
        ),
    )


def sum_differences(job: WeightJob) -> Tensor | LowRank:
    """Return ``Σ w_i (P_i - P_0)`` of a weight of any shape (Algorithm 2, lines 12 to 16)."""
    factors: list[LowRank] = []
    whole: Tensor | None = None
    for delta in form_differences(job):
        if isinstance(delta, LowRank):
            factors.append(delta)
        elif whole is None:
            whole = torch.zeros_like(delta, dtype=job.compute_dtype).add_(delta)
        else:
            whole += delta
    if whole is None:
        return sum_of(factors or [_zero(job.base.shape)])
    for low in factors:
        whole += low.dense().to(job.compute_dtype)
    return whole


def _trim_known(delta: Tensor | LowRank, task: Task, dtype: torch.dtype) -> Tensor | LowRank:
    """Scale and trim a difference that is known as it is; trimming needs the whole matrix."""
    if isinstance(delta, Tensor):
        return trim(delta.to(dtype) * task.weight, task.density)
    low = delta.times(task.weight)
    return low if task.density == 1 or not low.rank else trim(low.dense().to(dtype), task.density)


def _zero(shape: tuple[int, ...]) -> LowRank:
    m, n = shape
    left = torch.zeros(m, 0, dtype=torch.float64)
    return LowRank(left, left.new_zeros(0, n))
