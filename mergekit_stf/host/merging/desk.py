"""Runs jobs in this process, and owns whatever has a memory: store, records, warnings."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_stf.core import Merged, Record
from mergekit_stf.host.diagnostics.memory import peak_device, peak_rss
from mergekit_stf.host.diagnostics.notices import Notice, Notices, find_ill_posed
from mergekit_stf.host.diagnostics.records import VARIABLE, Recorder, Records
from mergekit_stf.host.merging.job import (
    WeightJob,
    WeightResult,
    check_inputs,
    copy_base,
    finish,
    is_copied,
    merge_matrix,
    record_of,
    with_tensors,
)
from mergekit_stf.host.merging.records import sorted_by_model
from mergekit_stf.host.store.jobs import Matrices, Shelf, takes
from mergekit_stf.host.store.store import VARIABLE as STORE
from mergekit_stf.host.store.store import VARIABLE_SIZE as STORE_SIZE
from mergekit_stf.host.store.store import store_of_environment


class Desk:
    """Where the jobs of one merge are run; several threads may run jobs at a time.

    Args:
        store: keeps merged matrices, None for none.
        recorder: writes what was done to each weight, None for none.
        notices: says what is to be said once a merge.
    """

    def __init__(
        self,
        store: Matrices | None = None,
        recorder: Records | None = None,
        notices: Notices | None = None,
    ) -> None:
        self.store, self.recorder = store, recorder
        self.notices = notices or Notices()
        self._precision = _Precision()

    def run(self, job: WeightJob) -> WeightResult:
        """Merge one weight, from the store if it is there, and write down what was done.

        Inputs whose answer is in the store are not checked again: they were before it was stored.

        Raises:
            STFError: as ``job.merge_weight``, or the store or the records cannot be written.
        """
        job = with_tensors(job)
        started = time.perf_counter()
        if is_copied(job):
            result = copy_base(job)
        else:
            shelf = None if self.store is None or not takes(job) else Shelf(self.store, job)
            merged = None if shelf is None else shelf.get()
            if merged is None:
                check_inputs(job)
                with self._precision.full():
                    merged = merge_matrix(job)
                if shelf is not None:
                    shelf.put(merged)
            result = finish(job, merged)
        self._write_down(result.record, result.notices, started, result.tensor.device)
        return result

    def merge_matrix(self, job: WeightJob) -> Merged:
        """Merge one weight up to the matrix, which the caller adds to the base.

        Raises:
            STFError: as ``job.merge_matrix``.
        """
        started = time.perf_counter()
        check_inputs(job)
        with self._precision.full():
            merged = merge_matrix(job)
        record = record_of(job, merged)
        self._write_down(record, (*job.notices, *find_ill_posed(record)), started, job.base.device)
        return merged

    def _write_down(
        self,
        record: Record | None,
        notices: tuple[Notice, ...],
        started: float,
        device: torch.device,
    ) -> None:
        self.notices.say(notices)
        if self.recorder is not None and record is not None:
            self.recorder.write(
                replace(
                    sorted_by_model(record),
                    seconds=time.perf_counter() - started,
                    peak_rss=peak_rss(),
                    peak_device=peak_device(device),
                )
            )


Environment = tuple[str | None, ...]


def read_environment() -> Environment:
    """Return what the environment says now of where to store and to record."""
    return tuple(map(os.environ.get, (VARIABLE, STORE, STORE_SIZE)))


def desk_of_environment() -> Desk:
    """Return a desk with the store and the records that the environment names, if it does."""
    path = os.environ.get(VARIABLE)
    return Desk(store_of_environment(), Recorder(Path(path)) if path else None)


class _Precision:
    """Full precision of products while any thread merges, and the process's own when none does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outside = "highest"

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Switch to full precision inside the block."""
        with self._lock:
            if not self._inside:
                self._outside = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.set_float32_matmul_precision(self._outside)
