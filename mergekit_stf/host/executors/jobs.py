"""The weights of a planned merge as jobs: what each takes, and which are merged elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_stf.core import methods
from mergekit_stf.host.planning.estimate import input_bytes, working_bytes
from mergekit_stf.host.planning.planned import PlannedWeight, planned_weight

PROCESS = 600_000_000
"""Bytes of a worker before it has read a weight: Python, torch and transformers (measured)."""


@dataclass(frozen=True)
class Job:
    """A weight that a worker can merge.

    Attributes:
        task: the host's.
        weight: what is planned for it.
    """

    task: SaveTensor
    weight: PlannedWeight

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.weight.name

    def memory(self, device: torch.device) -> int:
        """Return the bytes that a process on a node with this kind of device takes for it.

        These are the process itself, the inputs, what the method needs, the result and the matrix
        for the store.
        """
        on_card = device.type == "cuda"
        work = 0 if on_card else working_bytes(self.weight, device)
        written = self.weight.numel * self.weight.out_dtype.itemsize
        return PROCESS + input_bytes([self.weight]) + work + written + self.weight.stored_bytes

    def device_memory(self, device: torch.device) -> int:
        """Return the bytes of a card's memory that it takes, 0 on the CPU."""
        if device.type != "cuda":
            return 0
        return input_bytes([self.weight]) + working_bytes(self.weight, device)


def jobs_of(tasks: Iterable[Task]) -> list[Job]:
    """Return a job for each weight that one of our methods merges from stored tensors alone.

    They keep the order of the output, and are begun in it: so results are written as they come. The
    costliest first would end up to 1.5 times later, because nearly all would wait for their turn
    on the disk (``benchmarks/cluster_simulation.py``).

    What is left, weights whose vocabulary is aligned first, and those of the host's methods, which
    may draw random numbers in the order of the output, are merged where the merge was started; so
    are those of methods that look at whole models first, which is all that takes time there.
    """
    return [
        Job(task, planned_weight(task))
        for task in tasks
        if isinstance(task, SaveTensor) and _is_ours(task.tensor_task)
    ]


def share_of_card(device: torch.device, needed: int, memory: int) -> float:
    """Return the part of a card that a weight asks for, in quarters: 1 for large ones, 0 on a CPU.

    Args:
        device: its kind.
        needed: bytes of a card's memory that the weight takes.
        memory: bytes of the smallest card.
    """
    if device.type != "cuda":
        return 0.0
    return min(4, max(1, math.ceil(4 * needed / memory))) / 4


def _is_ours(task: Task) -> bool:
    return (
        isinstance(task, ExecuteMergeMethodTask)
        and methods.is_known(task.method_name)
        and not methods.get(task.method_name).whole_models
        and isinstance(task.gather_tensors, GatherTensors)
    )
