"""What the store keeps of jobs: the merged matrix of a weight, and the record of its making."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from mergekit_stf.core import Merged, STFError, methods
from mergekit_stf.core.methods.method import BASE, MERGE
from mergekit_stf.host.checkpoints.stored import as_tensor
from mergekit_stf.host.diagnostics.records import from_json, to_json
from mergekit_stf.host.merging.job import WeightJob
from mergekit_stf.host.store.entry import key_of, source_of

T = TypeVar("T")


class Matrices(Protocol):
    """What keeps merged matrices by their keys: a ``Store``, or what a worker carries."""

    def get(self, key: str, read: Callable[[Tensor, str], T]) -> T | None:
        """Return what ``read`` makes of a matrix and its note, None where there is none."""

    def put(self, key: str, matrix: Tensor, note: str = "") -> None:
        """Keep a matrix and a note."""


class Shelf:
    """The place of one job in a store.

    Args:
        store: the store.
        job: with its tensors at hand.
    """

    def __init__(self, store: Matrices, job: WeightJob) -> None:
        self._store, self._job = store, job
        self._key = key_of([as_tensor(job.base), *tuned_of(job)], conditions_of(job))

    def get(self) -> Merged | None:
        """Return what is stored for the job, None where nothing is."""
        return self._store.get(self._key, partial(_restored, self._job))

    def put(self, merged: Merged) -> None:
        """Store what was merged; what is in factors is cheap to merge again, and is not stored.

        Raises:
            STFError: this or the entry before it could not be written.
        """
        if isinstance(merged.M, Tensor):
            self._store.put(self._key, merged.M, to_json(merged.record))


def takes(job: WeightJob) -> bool:
    """Say whether a job is one whose result is stored; adapters' factors are read as quickly."""
    from_tensors = all(task.tuned is not None for task in job.tasks)
    densities = [task.density for task in job.tasks]
    return from_tensors and is_worth(job.resolved_rule, len(job.base.shape), densities)


def is_worth(rule: str, dimensions: int, densities: Sequence[float]) -> bool:
    """Say whether a weight takes longer to compute than to read.

    Args:
        rule: that merges the weight, as ``WeightJob.resolved_rule`` has it.
        dimensions: of its shape.
        densities: the fraction that trimming keeps, for each task.
    """
    return dimensions > 1 and (rule == MERGE or (rule != BASE and min(densities) < 1))


def conditions_of(job: WeightJob) -> dict[str, object]:
    """Return all that M depends on besides tensors and machine: no lambda, and sums no options."""
    merges = job.resolved_rule == MERGE
    own = {
        "method": job.method,
        "source": source_of(type(methods.get(job.method))),
        "options": sorted(job.options.items()),
        "split": str(job.split),
        "input_axis": job.input_axis,
        "squared_distances": [task.squared_distance for task in job.tasks],
    }
    return (own if merges else {"rule": "sum"}) | {
        "weights": [task.weight for task in job.tasks],
        "densities": [task.density for task in job.tasks],
    }


def tuned_of(job: WeightJob) -> list[Tensor]:
    """Return the models' tensors."""
    return [as_tensor(task.tuned) for task in job.tasks if task.tuned is not None]


def _restored(job: WeightJob, M: Tensor, note: str) -> Merged:
    """Return matrix and record of an entry.

    Raises:
        ValueError: they cannot be what was stored for this job.
    """
    if M.shape != job.base.shape or M.dtype != job.compute_dtype:
        raise STFError(f"it holds {M.dtype} of shape {tuple(M.shape)}")
    record = from_json(note)
    if len(record.norms) not in (0, len(job.tasks)):
        raise STFError(f"its note tells of another number of tasks than {len(job.tasks)}")
    return Merged(M.to(job.base.device), record)
