"""Decompose several task matrices at a time on a CPU, each on its share of the cores.

LAPACK's eigensolver gains little from a second core: two matrices of 768 at once, each on one core,
take four fifths of the time of one after the other on both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

WORKSPACE = 2**29
"""Bytes that the decompositions running at a time may need together."""

SQUARES = 32
"""Bytes of workspace for each entry of an n×n Gram matrix: it, its eigenvectors, LAPACK's two."""

Result = TypeVar("Result")
_sharing = threading.Lock()


def over_tasks(work: Callable[[Tensor], Result], matrices: Iterable[Tensor]) -> list[Result]:
    """Return ``work(M)`` for each matrix, in order, as many at a time as cores and memory allow.

    Whole rounds, a matrix for each worker, follow each other without a wait in between; those that
    are left over at the end share all cores. Matrices are taken from the iterable a round ahead.
    """
    rest = iter(matrices)
    first = next(rest, None)
    if first is None:
        return []
    rest, workers = chain([first], rest), _at_a_time(first)
    work = torch.no_grad()(work)
    with _shared_cores(workers) as pool:
        if pool is None:
            return list(map(work, rest))
        running: list[Future[Result]] = []
        try:
            while len(batch := list(islice(rest, workers))) == workers:
                for M in batch:
                    _wait_for_one(running, workers)
                    running.append(pool.submit(work, M))
        finally:
            wait(running)
    results = [future.result() for future in running]
    with _shared_cores(len(batch)) as pool:
        return results + list((map if pool is None else pool.map)(work, batch))


def _wait_for_one(running: list[Future[Result]], workers: int) -> None:
    """Return when fewer matrices than workers are worked on."""
    busy = [future for future in running if not future.done()]
    if len(busy) == workers:
        wait(busy, return_when=FIRST_COMPLETED)


def _at_a_time(M: Tensor) -> int:
    if M.device.type != "cpu":
        return 1
    room = WORKSPACE // (SQUARES * max(1, min(M.shape)) ** 2)
    return max(1, min(torch.get_num_threads(), room))


@contextmanager
def _shared_cores(workers: int) -> Iterator[ThreadPoolExecutor | None]:
    """Divide torch's threads, which are counted for the whole process, among the workers.

    Nothing is divided for one worker or none, nor while another thread of the process shares.
    """
    if workers < 2 or not _sharing.acquire(blocking=False):
        yield None
        return
    threads = torch.get_num_threads()
    try:
        pool = _pool(workers, threads // workers)
        torch.set_num_threads(threads // workers)
        yield pool
    finally:
        torch.set_num_threads(threads)
        _sharing.release()


@lru_cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Keep threads between weights: new ones lose a tenth to their first allocations."""
    return ThreadPoolExecutor(workers, "stf", torch.set_num_threads, (threads,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
