"""Decompose several task matrices at a time on a CPU, each on its share of the cores.

LAPACK's eigensolver gains little from a second core: two matrices of 768 at once, each on one core,
take four fifths of the time of one after the other on both.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

WORKSPACE = 3 * 2**28
"""Bytes that the decompositions running at a time may need together."""

SQUARES = 32
"""Bytes of workspace for each entry of an n×n Gram matrix: it, its eigenvectors, LAPACK's two."""

Result = TypeVar("Result")
_sharing = threading.Lock()


def over_tasks(work: Callable[[Tensor], Result], matrices: Iterable[Tensor]) -> list[Result]:
    """Return ``work(M)`` for each matrix, in order, as many at a time as cores and memory allow.

    Rounds of a matrix for each worker follow each other without a wait in between. What is left
    over at the end is worked on together with the last round: three matrices at once on two cores
    take less time than two and then one, as that one would gain little from a core of its own.
    Matrices are taken from the iterable a round ahead.
    """
    rest = iter(matrices)
    taken = deque(islice(rest, 1))
    if not taken:
        return []
    work, workers = torch.no_grad()(work), _workers(min(taken[0].shape), taken[0].device)
    taken.extend(islice(rest, workers - 1))
    with _shared_cores(len(taken)) as pool:
        if pool is None:
            return _one_by_one(work, taken, rest)
        return _in_rounds(pool, work, taken, rest, workers)


def _one_by_one(
    work: Callable[[Tensor], Result], taken: deque[Tensor], rest: Iterator[Tensor]
) -> list[Result]:
    """Hold no matrix that has been worked on."""
    results = []
    while taken:
        results.append(work(taken.popleft()))
        taken.extend(islice(rest, 0 if taken else 1))
    return results


def _in_rounds(
    pool: ThreadPoolExecutor,
    work: Callable[[Tensor], Result],
    now: deque[Tensor],
    rest: Iterator[Tensor],
    workers: int,
) -> list[Result]:
    running: list[Future[Result]] = []
    try:
        while now:
            ahead: deque[Tensor] = deque()
            while now:
                _wait_for_one(running, workers)
                running.append(pool.submit(work, now.popleft()))
                ahead.extend(islice(rest, 1))
            while 0 < len(ahead) < workers:
                running.append(pool.submit(work, ahead.popleft()))
            now = ahead
    finally:
        wait(running)
    return [future.result() for future in running]


def _wait_for_one(running: list[Future[Result]], workers: int) -> None:
    """Return when fewer matrices than workers are worked on."""
    busy = [future for future in running if not future.done()]
    if len(busy) >= workers:
        wait(busy, return_when=FIRST_COMPLETED)


def workspace(side: int, tasks: int, device: torch.device) -> int:
    """Return the bytes that decompositions of a smaller side need besides matrices and features."""
    return SQUARES * side**2 * min(tasks, 2 * _workers(side, device) - 1)


def _workers(side: int, device: torch.device) -> int:
    """Return how many workers there can be: the last round is of up to twice as many, less one."""
    if device.type != "cpu":
        return 1
    room = WORKSPACE // (SQUARES * max(1, side) ** 2)
    return max(1, min(torch.get_num_threads(), (room + 1) // 2))


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
    return ThreadPoolExecutor(2 * workers - 1, "stf", torch.set_num_threads, (threads,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
