"""Jobs as tasks of Ray: so many at a time, and their results taken as they come."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.cluster.joining import cause_of
from mergekit_stf.host.executors.execution import Devices, Execution
from mergekit_stf.host.executors.jobs import Job
from mergekit_stf.host.executors.messages import Entry, Order, Packed, Reply
from mergekit_stf.host.executors.spool import Spool

RETRIES = 3
"""Times that Ray runs a task again whose process or node has died; this is Ray's own default."""

AHEAD = 2
"""Tasks that are handed to Ray for each place: one that runs, and one that can begin after it."""

PATIENCE = 0.2
"""Seconds after which a thread that waits for Ray looks whether the merge is still wanted."""

Submit = Callable[[Job, Order], Any]


@dataclass
class Tasks:
    """The jobs of one merge on a cluster.

    Attributes:
        execution: the merge.
        submit: hands a job to Ray and returns its reference.
        places: how many jobs the cluster runs at a time.
        devices: which kinds of devices took part.
    """

    execution: Execution
    submit: Submit
    places: int
    devices: Devices

    @contextmanager
    def started(self, jobs: Sequence[Job], spool: Spool) -> Iterator[None]:
        """Run jobs beside the block; what is not done at its end is cancelled."""
        stop = threading.Event()
        loop = threading.Thread(target=self._serve, args=(jobs, spool, stop), name="ray")
        loop.start()
        try:
            yield
        finally:
            stop.set()
            loop.join()

    def _serve(self, jobs: Sequence[Job], spool: Spool, stop: threading.Event) -> None:
        running: dict[Any, tuple[Job, Order]] = {}
        try:
            self._loop(jobs, spool, stop, running)
        except BaseException as error:  # it is raised where the results are waited for
            spool.fail(error)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _loop(
        self,
        jobs: Sequence[Job],
        spool: Spool,
        stop: threading.Event,
        running: dict[Any, tuple[Job, Order]],
    ) -> None:
        waiting = deque((job, Order(job.task)) for job in jobs)
        with tqdm(total=len(jobs), desc="Merging", disable=self.execution.options.quiet) as bar:
            while (waiting or running) and not stop.is_set():
                while waiting and len(running) < AHEAD * self.places:
                    job, order = waiting.popleft()
                    order = replace(order, stored=self.execution.store.skipped == 0)
                    running[self.submit(job, order)] = job, order
                done, _ = ray.wait(list(running), timeout=PATIENCE)
                for reference in done:
                    job, order = running.pop(reference)
                    again = self._received(job, order, _got(reference, job), spool)
                    if again is None:
                        bar.update()
                    else:
                        waiting.appendleft((job, again))
                bar.set_postfix(
                    running=min(len(running), self.places), nodes=len(self.devices.kinds)
                )

    def _received(self, job: Job, order: Order, reply: Reply, spool: Spool) -> Order | None:
        """Keep what a worker has answered, or return the order with what it has asked for."""
        if reply.wanted is not None:
            return self._with_entry(order, reply.wanted)
        self.devices.kinds[reply.node] = reply.device
        for text, category in reply.warnings:
            warnings.warn(text, category, stacklevel=1)
        desk, store = self.execution.desk, self.execution.store
        for entry in reply.entries:
            store.put(entry.key, entry.matrix.tensor(), entry.note)
        desk.notices.say(reply.notices)
        for record in reply.records:
            if desk.recorder is not None:
                desk.recorder.write(record)
        spool.put(job.task.tensor_name, None if reply.tensor is None else reply.tensor.tensor())
        return None

    def _with_entry(self, order: Order, key: str) -> Order:
        found = self.execution.store.get(key, lambda matrix, note: (matrix, note))
        if found is None:  # damaged: the weight is merged anew
            return replace(order, lost=key)
        return replace(order, given=Entry(key, Packed.of(found[0]), found[1]))


def _got(reference: Any, job: Job) -> Reply:
    """Return the answer of a task.

    Raises:
        STFError: that the task has raised, or its processes died each time.
    """
    try:
        reply: Reply = ray.get(reference)
    except RayTaskError as error:
        raise cause_of(error) from None
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise STFError(
            f"{job.name}: it was begun {RETRIES + 1} times and not finished ({reason}); "
            "what is finished is kept, run the same command again"
        ) from error
    return reply
