"""SHA-256 of everything that a merge reads, computed while it runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import sha256_of
from mergekit_stf.host.inputs import InputModel

_known: dict[tuple[Path, tuple[int, int, int]], str] = {}


class Digests:
    """SHA-256 of every input, computed in the background while the merge runs.

    A file that this process has read before, and that has kept its size, time and inode since,
    is not read again: the points of a sweep share their inputs.

    Args:
        models: the inputs.
    """

    def __init__(self, models: list[InputModel]) -> None:
        paths = [model.folder / name for model in models for name in model.files]
        self._before = {path: _identity(path) for path in paths}
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._futures: dict[Path, Future[str]] = {}

    def __enter__(self) -> Digests:
        """Start reading."""
        for path, before in self._before.items():
            if (path, before) not in _known:
                self._futures[path] = self._pool.submit(sha256_of, path, self._stop.is_set)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop reading, at once when the merge has failed."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[Path, str]:
        """Wait for the digests of all inputs.

        Raises:
            STFError: an input was changed since the merge began.
        """
        new = {path: future.result() for path, future in self._futures.items()}
        for path, before in self._before.items():
            if _identity(path) != before:
                raise STFError(f"{path} was changed during the merge; run the same command again")
        _known.update({(path, self._before[path]): digest for path, digest in new.items()})
        return {path: _known[path, before] for path, before in self._before.items()}


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
