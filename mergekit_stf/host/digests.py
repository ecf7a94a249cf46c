"""SHA-256 of everything that a merge reads, computed while it runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import sha256_of
from mergekit_stf.host.inputs import InputModel


class Digests:
    """SHA-256 of every input, computed in the background while the merge runs.

    Args:
        models: the inputs.
    """

    def __init__(self, models: list[InputModel]) -> None:
        self._paths = [model.folder / name for model in models for name in model.files]
        self._before = {path: _identity(path) for path in self._paths}
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._futures: dict[Path, Future[str]] = {}

    def __enter__(self) -> Digests:
        """Start reading."""
        for path in self._paths:
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
        digests = {path: future.result() for path, future in self._futures.items()}
        for path, before in self._before.items():
            if _identity(path) != before:
                raise STFError(f"{path} was changed during the merge; run the same command again")
        return digests


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
