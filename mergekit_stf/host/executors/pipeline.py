"""A merge whose weights are merged elsewhere: plan, jobs, results, writer.

It takes the place of the host's executor, and gives the host's writer the same tensors in the same
order, so that the files have the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, SaveTensor

from mergekit_stf.host.executors.execution import Execution
from mergekit_stf.host.executors.jobs import Job, jobs_of
from mergekit_stf.host.executors.spool import Spool
from mergekit_stf.host.executors.worker import rounded_tensor

LOG = logging.getLogger("mergekit_stf")

Start = Callable[[Sequence[Job], Spool], AbstractContextManager[None]]
"""Begins jobs whose results go into the spool; they are done or cancelled at the block's end."""


class Pipeline:
    """In the place of the host's executor: its tasks, with jobs started elsewhere.

    Args:
        targets: what the host has planned: a task for each weight, and those that come after.
        execution: the merge.
        device: where weights are merged that stay in this process.
        start: begins the jobs.
    """

    def __init__(
        self, targets: Sequence[Task], execution: Execution, device: torch.device, start: Start
    ) -> None:
        self._targets, self._execution = targets, execution
        self._device, self._start = device, start

    def run(self, quiet: bool = False) -> Iterator[tuple[Task, Any]]:
        """Merge and write all weights, and yield the results of the other tasks."""
        saves = self._in_order()
        jobs = jobs_of(saves)
        if not jobs:
            LOG.warning("--ray: this merge method has no weights for a cluster, all stay here")
            yield from self._host(self._targets).run(quiet=quiet)
            return
        elsewhere = {job.task for job in jobs}
        here = {save.tensor_task: save for save in saves if save not in elsewhere}
        others = [t for t in self._targets if not isinstance(t, (SaveTensor, FinalizeModel))]
        spool, found = Spool(self._execution.scratch), []
        try:
            with self._start(jobs, spool):
                for task, value in self._host([*here, *others]).run(quiet=True):
                    if task in here:
                        spool.put(here[task].tensor_name, rounded_tensor(here[task], value))
                    else:
                        found.append((task, value))
                _write(saves, spool)
        finally:
            spool.close()
        yield from found

    def _host(self, tasks: Sequence[Task]) -> Executor:
        storage = self._device if self._execution.options.low_cpu_memory else torch.device("cpu")
        return Executor(list(tasks), math_device=self._device, storage_device=storage)

    def _in_order(self) -> list[SaveTensor]:
        """Return the weights in the order in which the host would write them."""
        planned = [handle.task() for handle in self._host(self._targets).schedule.tasks]
        return [task for task in planned if isinstance(task, SaveTensor)]


def _write(saves: Sequence[SaveTensor], spool: Spool) -> None:
    writer = saves[0].writer_task.execute()
    for save in saves:
        tensor = spool.take(save.tensor_name)
        if tensor is not None:
            writer.save_tensor(name=save.tensor_name, tensor=tensor, clone=save.clone)
    writer.finalize()
