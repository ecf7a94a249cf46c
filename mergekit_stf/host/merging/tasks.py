"""A weight as the tuned models have it: checked, in a fixed order, as task matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_stf.core import STFError, trim


@dataclass(frozen=True)
class Task:
    """One tuned model's version of a weight.

    Attributes:
        label: the model, as errors and reports name it.
        tuned: its tensor, in the type that the host aligned all inputs to.
        weight: scales the task matrix.
        density: fraction of the task matrix that trimming keeps.
    """

    label: str
    tuned: Tensor
    weight: float
    density: float


def ordered(
    group: TensorGroup, weights: Mapping[Hashable, float], densities: Mapping[Hashable, float]
) -> list[Task]:
    """Return the tuned tensors in an order that does not depend on the recipe's.

    Sums round differently in another order, and the order of models in a recipe means nothing to
    STF: so that it costs no byte either, tasks are sorted by an integer checksum of their tensors,
    which is computed where they lie, and by a digest of their bytes where checksums are equal.
    """
    tasks = [
        Task(str(entry.id), entry.tensor, weights[entry.id], densities[entry.id])
        for entry in group.non_base
    ]
    if len(tasks) < 2:
        return tasks
    sums = [checksum(task.tuned) for task in tasks]
    counts = Counter(sums)
    digests = [
        digest(task.tuned) if counts[total] > 1 else ""
        for task, total in zip(tasks, sums, strict=True)
    ]
    keys = [
        (total, content, task.weight, task.density)
        for total, content, task in zip(sums, digests, tasks, strict=True)
    ]
    return [tasks[index] for index in sorted(range(len(tasks)), key=keys.__getitem__)]


def digest(x: Tensor) -> str:
    """Return a digest of a tensor's bytes, which depends on their places too."""
    return xxhash.xxh3_128_hexdigest(content_of(x).cpu().numpy().data)


def checksum(x: Tensor) -> int:
    """Return the sum of a tensor's bytes in words of eight, the same on every device.

    It does not depend on their places: a tensor with its rows permuted has the same.
    """
    content = content_of(x)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Say whether two tensors of one type hold the same bits."""
    return torch.equal(content_of(x), content_of(y))


def content_of(x: Tensor) -> Tensor:
    """Return the bytes of a tensor, flat."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def check_type(name: str, dtype: torch.dtype) -> None:
    """Refuse types that cannot hold a merged weight.

    Raises:
        STFError: the weight is quantised.
    """
    if dtype.itemsize < 2:
        raise STFError(
            f"{name}: {str(dtype).removeprefix('torch.')} weights differ between the models and "
            "cannot be merged; dequantise the checkpoints first, or set `dtype: bfloat16`"
        )


def deltas(base: Tensor, tasks: Sequence[Task], compute: torch.dtype) -> Iterator[Tensor]:
    """Yield the task matrices ``w_i (P_i - P0)``, trimmed, one at a time (Algorithm 2, 4-5)."""
    reference = base.to(compute)
    for task in tasks:
        delta = task.tuned - reference
        if task.weight != 1:
            delta.mul_(task.weight)
        yield trim(delta, task.density)
