"""Several matrices at a time: on shares of a CPU's cores, or on streams of a card.

LAPACK's eigensolver gains little from a second core, and a card waits for the launches of small
matrices. So each worker takes one matrix, and there are as many workers as memory has room for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

WORKSPACE = 3 * 2**28
"""Bytes that the decompositions running at a time may need together."""

SQUARES: Mapping[str, int] = {"cpu": 32, "cuda": 40}
"""Bytes of workspace for each entry of an n×n Gram matrix in float64. On a CPU: the matrix, its
eigenvectors, and two of LAPACK's. A card needs more; half of it for leading features alone."""

STREAMS = 4
"""Matrices at a time on a card; each more keeps a workspace of the product library, 32 MB."""

Matrix = TypeVar("Matrix")
Result = TypeVar("Result")

_sharing = threading.Lock()
_large = threading.Lock()
_own = threading.local()


def workers_for(side: int, count: int, device: torch.device, leading: bool = False) -> int:
    """Return how many of ``count`` matrices of a smaller side are worked on at a time.

    On a CPU one more than there are cores: the system shares them out, so that none idles while the
    last matrix is worked on. Leading features take less memory on a card.
    """
    squares = SQUARES.get(device.type, SQUARES["cpu"]) * max(1, side) ** 2
    if device.type == "cuda":
        return max(1, min(count, STREAMS, WORKSPACE // (squares // 2 if leading else squares)))
    threads = torch.get_num_threads()
    return max(1, min(count, threads + 1, WORKSPACE // squares)) if threads > 1 else 1


def workspace(side: int, count: int, device: torch.device) -> int:
    """Return the bytes that decompositions of a smaller side need besides matrices and features."""
    squares = SQUARES.get(device.type, SQUARES["cpu"]) * side**2
    return squares * workers_for(side, count, device)


def map_matrices(
    work: Callable[[Matrix], Result], matrices: Iterable[Matrix], workers: int, device: torch.device
) -> list[Result]:
    """Return ``work(M)`` for each matrix, in order, so many at a time.

    A matrix is taken from the iterable when a worker is free, and no reference to it is kept. Where
    another thread of the process is in here already, this one takes its matrices one by one.
    """
    if workers == 1 or not _sharing.acquire(blocking=False):
        return [work(M) for M in matrices]
    threads = torch.get_num_threads()
    running: list[Future[Result]] = []
    left = iter(matrices)
    try:
        pool, task = _workers(work, workers, device)
        while True:
            _wait_for_a_free_one(running, workers)
            running.append(pool.submit(task, next(left)))  # which keeps no reference to the matrix
    except StopIteration:
        return [future.result() for future in running]
    finally:
        wait(running)
        torch.set_num_threads(threads)
        _sharing.release()


def lock_if_large(M: Tensor) -> AbstractContextManager[object]:
    """Return a lock that lets one large exact decomposition at a time run on a card; else no lock.

    Two would gain nothing, as each fills the card, and their workspaces would add up.
    """
    large = M.is_cuda and workers_for(min(M.shape), STREAMS, M.device) < STREAMS
    return _large if large else nullcontext()


def _workers(
    work: Callable[[Matrix], Result], workers: int, device: torch.device
) -> tuple[ThreadPoolExecutor, Callable[[Matrix], Result]]:
    """Return the threads and what they run; on a CPU its cores are shared out among them."""
    if device.type == "cuda":
        return _streams(device), partial(_on_stream, work, torch.cuda.current_stream(device))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    return _cores(workers, torch.get_num_threads()), torch.no_grad()(work)


def _wait_for_a_free_one(running: list[Future[Result]], workers: int) -> None:
    while len(busy := [future for future in running if not future.done()]) >= workers:
        wait(busy, return_when=FIRST_COMPLETED)


def _on_stream(work: Callable[[Matrix], Result], caller: torch.cuda.Stream, M: Matrix) -> Result:
    """Work on the thread's own stream, which waits for the caller's and has ended at the return."""
    stream: torch.cuda.Stream = _own.stream
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream), torch.no_grad():
            return work(M)
    finally:
        stream.synchronize()


@lru_cache
def _cores(workers: int, threads: int) -> ThreadPoolExecutor:
    """Keep threads between weights: new ones lose a tenth to their first allocations."""
    return ThreadPoolExecutor(workers, "stf", torch.set_num_threads, (threads,))


@lru_cache
def _streams(device: torch.device) -> ThreadPoolExecutor:
    """Keep threads and streams between weights: a new one needs new handles of the libraries.

    Torch loads its linear algebra at the first use, which two threads must not do at a time.
    """
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))

    def begin() -> None:
        torch.cuda.set_device(device)
        _own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    return ThreadPoolExecutor(STREAMS, "stf-card", begin)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cores.cache_clear)
    os.register_at_fork(after_in_child=_streams.cache_clear)
