"""SHA-256 of everything that a merge reads, computed while it runs."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, get_native_id
from types import TracebackType

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import pieces
from mergekit_stf.host.inputs import InputModel

LEAST = 19
"""The lowest priority of a thread."""

_known: dict[tuple[Path, tuple[int, int, int]], str] = {}


class Digests:
    """SHA-256 of every input, computed in the time that the merge leaves over.

    A file that this process has read before, and that has kept its size, time and inode since,
    is not read again: the points of a sweep share their inputs.

    Args:
        models: the inputs.
    """

    def __init__(self, models: list[InputModel]) -> None:
        paths = [model.folder / name for model in models for name in model.files]
        self._before = {path: _identity(path) for path in paths}
        self._new: dict[Path, str] = {}
        self._steps = self._read()
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
        """Return the digests of all inputs, after reading what is not read yet.

        Raises:
            STFError: an input cannot be read, or was changed since the merge began.
        """
        self._stop.set()
        self._beside.result()
        for _ in self._steps:  # here and not there, where other programs could delay it for long
            pass
        for path, before in self._before.items():
            if _identity(path) != before:
                raise STFError(f"{path} was changed during the merge; run the same command again")
        _known.update({(path, self._before[path]): digest for path, digest in self._new.items()})
        return {path: _known[path, before] for path, before in self._before.items()}

    def _read(self) -> Iterator[None]:
        """Read all files in small steps, which one thread may begin and another finish."""
        for path, before in self._before.items():
            if (path, before) not in _known:
                digest = hashlib.sha256()
                for piece in pieces(path):
                    digest.update(piece)
                    yield
                self._new[path] = digest.hexdigest()

    def _read_beside(self) -> None:
        for _ in self._steps:
            if self._stop.is_set():
                return


def _give_way() -> None:
    """Let the merge's threads go first; only on Linux has a thread a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), LEAST)


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
