"""SHA-256 of everything that a merge reads, computed while it runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType

import torch

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import read_chunks, sha256_of
from mergekit_stf.host.checkpoints.inputs import InputModel

Known = dict[tuple[Path, tuple[int, int, int]], str]
"""Digests of files, by path and by what changes with their content: size, time and inode."""


class Digests:
    """SHA-256 of every input, read while a processor has nothing else to do, and at the end.

    Hashing at the merge's own priority would delay it by more than the hashing takes: all
    threads of a matrix product wait for the one that had to share its processor.

    Args:
        models: the inputs.
        known: digests that the caller keeps from merge to merge, so that the points of a sweep read
            their inputs once; new ones are added.
    """

    def __init__(self, models: list[InputModel], known: Known | None = None) -> None:
        self._known = {} if known is None else known
        paths = [model.folder / name for model in models for name in model.files]
        self._before = {path: _identity(path) for path in paths}
        self._new: dict[Path, str] = {}
        unknown = [entry for entry in self._before.items() if entry not in self._known]
        self._left = deque(self._read(path) for path, _ in unknown)
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max_workers=1, initializer=_give_way)
        self._beside: Future[None]

    def __enter__(self) -> Digests:
        """Start reading."""
        self._beside = self._pool.submit(self._read_beside)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop reading, at once when the merge has failed."""
        self._stop.set()
        self._pool.shutdown()

    def result(self) -> dict[Path, str]:
        """Read what is left, now with all threads, and return the digests of all inputs.

        Raises:
            STFError: an input cannot be read, or was changed since the merge began.
        """
        self._stop.set()
        self._beside.result()
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            list(pool.map(_finish, self._left))
        for path, before in self._before.items():
            if _identity(path) != before:
                raise STFError(f"{path} was changed during the merge; run the same command again")
        self._known.update({(p, self._before[p]): digest for p, digest in self._new.items()})
        return {path: self._known[path, before] for path, before in self._before.items()}

    def _read(self, path: Path) -> Iterator[None]:
        """Hash a file in small steps, which one thread may begin and another finish."""
        digest = hashlib.sha256()
        for piece in read_chunks(path):
            digest.update(piece)
            yield
        self._new[path] = digest.hexdigest()

    def _read_beside(self) -> None:
        while self._left:
            for _ in self._left[0]:
                if self._stop.is_set():
                    return
            self._left.popleft()


def digest_of(path: Path, known: Known) -> str:
    """Return the SHA-256 of a file, which is read unless it is known and has not changed since.

    Args:
        path: the file.
        known: as for ``Digests``; a new digest is added.

    Raises:
        STFError: the file cannot be read.
    """
    before = _identity(path)
    if (path, before) not in known:
        known[path, before] = sha256_of(path)
    return known[path, before]


def _finish(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def _give_way() -> None:
    """Run this thread only where nothing else runs, on a system that can do that."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(PermissionError):  # some containers forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
