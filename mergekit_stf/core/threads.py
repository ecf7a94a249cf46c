"""Decompose several task matrices at a time on a CPU, each on its share of the cores.

LAPACK's eigensolver gains little from a second core: two matrices of 768 at once, each on one core,
take four fifths of the time of one after the other on both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
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

    Matrices are taken from the iterable only when they are worked on.
    """
    results: list[Result] = []
    rest = iter(matrices)
    for first in rest:
        batch = [first, *islice(rest, _at_a_time(first) - 1)]
        with _shared_cores(len(batch)) as pool:
            run = map if pool is None else pool.map
            results += run(torch.no_grad()(work), batch)
    return results


def _at_a_time(M: Tensor) -> int:
    if M.device.type != "cpu":
        return 1
    room = WORKSPACE // (SQUARES * max(1, min(M.shape)) ** 2)
    return max(1, min(torch.get_num_threads(), room))


@contextmanager
def _shared_cores(workers: int) -> Iterator[ThreadPoolExecutor | None]:
    """Divide torch's threads, which are counted for the whole process, among the workers.

    Nothing is divided for one worker, nor while another thread of the process does the same.
    """
    if workers == 1 or not _sharing.acquire(blocking=False):
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
