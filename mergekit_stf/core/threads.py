"""Decompose several task matrices at a time: on shares of a CPU's cores, or on streams of a card.

LAPACK's eigensolver gains little from a second core: two matrices of 768 at once, each on one core,
take four fifths of the time of one after the other on both. On a card, small matrices and narrow
blocks wait for launches: seven matrices of 768 take four fifths, the leading fifth of three
matrices of 4096 three fifths of the time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_stf.core.features import kept_rank

WORKSPACE = 3 * 2**28
"""Bytes that the decompositions running at a time may need together."""

SQUARES = 32
"""Bytes of workspace for each entry of an n×n Gram matrix: it, its eigenvectors, LAPACK's two."""

CARD_SQUARES = 40
"""The same on a card, where the eigensolver's own workspace is larger."""

LEADING_SQUARES = 16
"""The same where only leading features are computed, on a card."""

STREAMS = 4
"""Matrices at a time on a card; each more keeps a workspace of the product library, 32 MB."""

Result = TypeVar("Result")
_large = threading.Lock()
_sharing = threading.Lock()


def over_tasks(
    work: Callable[[Tensor], Result], matrices: Iterable[Tensor], rank: float = 1.0
) -> list[Result]:
    """Return ``work(M)`` for each matrix, in order, as many at a time as cores and memory allow.

    Rounds of a matrix for each worker follow each other without a wait in between. What is left
    over at the end is worked on together with the last round: three matrices at once on two cores
    take less time than two and then one, as that one would gain little from a core of its own.
    Matrices are taken from the iterable a round ahead.

    Args:
        work: what is done, on the device of its matrix.
        matrices: taken one by one.
        rank: features that it computes, as ``kept_rank`` counts them; fewer take less memory.
    """
    rest = iter(matrices)
    taken = deque(islice(rest, 1))
    if not taken:
        return []
    if taken[0].is_cuda:
        return _on_streams(torch.no_grad()(work), taken, rest, rank)
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


def _on_streams(
    work: Callable[[Tensor], Result], taken: deque[Tensor], rest: Iterator[Tensor], rank: float
) -> list[Result]:
    """Work on several matrices at a time, each thread on a stream of its own.

    A stream waits for what came before on the caller's, and has ended when its result is returned.
    """
    m, n = taken[0].shape
    device, side = taken[0].device, min(m, n)
    leading = kept_rank((m, n), rank) < side
    workers = _streams(side, LEADING_SQUARES if leading else CARD_SQUARES)
    if workers < 2 or not _sharing.acquire(blocking=False):
        return _one_by_one(work, taken, rest)
    running: list[Future[Result]] = []
    pool, caller = _card_pool(device), torch.cuda.current_stream(device)

    def on_stream(M: Tensor) -> Result:
        stream: torch.cuda.Stream = _own.stream
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                return work(M)
        finally:
            stream.synchronize()

    try:
        while taken:
            _wait_for_one(running, workers)
            running.append(pool.submit(on_stream, taken.popleft()))
            taken.extend(islice(rest, 1))
    finally:
        wait(running)
        _sharing.release()
    return [future.result() for future in running]


_own = threading.local()


@lru_cache
def _card_pool(device: torch.device) -> ThreadPoolExecutor:
    """Keep threads and streams between weights: a new one needs new handles of the libraries.

    Torch loads its linear algebra at the first use, which two threads must not do at a time.
    """
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))

    def begin() -> None:
        torch.cuda.set_device(device)
        _own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    return ThreadPoolExecutor(STREAMS, "stf-card", begin)


def _streams(side: int, squares: int = CARD_SQUARES) -> int:
    """Return how many matrices of a smaller side fit at a time, of so many bytes an entry."""
    return max(1, min(STREAMS, WORKSPACE // (squares * max(1, side) ** 2)))


def alone(M: Tensor) -> AbstractContextManager[object]:
    """Return what keeps large exact decompositions on a card from running at a time.

    They fill it, so that they gain nothing from each other, and their workspaces would add up.
    """
    large = M.is_cuda and _streams(min(M.shape)) < STREAMS
    return _large if large else nullcontext()


def _wait_for_one(running: list[Future[Result]], workers: int) -> None:
    """Return when fewer matrices than workers are worked on."""
    busy = [future for future in running if not future.done()]
    if len(busy) >= workers:
        wait(busy, return_when=FIRST_COMPLETED)


def workspace(side: int, tasks: int, device: torch.device) -> int:
    """Return the bytes that decompositions of a smaller side need besides matrices and features."""
    if device.type == "cuda":
        return CARD_SQUARES * side**2 * min(tasks, _streams(side))
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
    os.register_at_fork(after_in_child=_card_pool.cache_clear)
