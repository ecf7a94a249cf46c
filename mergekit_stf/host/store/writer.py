"""Entries of the store written beside the merge, which goes on with the next weight meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from types import TracebackType


class Writer:
    """A thread that writes one entry at a time; several may start entries.

    At most one entry waits. So memory holds one matrix more than without the thread, and a crash
    costs at most the weight that was finished last.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._lock = RLock()
        self._last: Future[None] | None = None

    def __enter__(self) -> Writer:
        """Be ready to write."""
        return self

    def start(self, write: Callable[[], None]) -> None:
        """Run ``write`` in the thread, after what was started before has ended well."""
        with self._lock:
            self.wait()
            self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            STFError: it could not be written.
        """
        with self._lock:
            last, self._last = self._last, None
            if last is not None:
                last.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the last entry, after an error too, which is then the one that is raised."""
        self._pool.shutdown()
        if error is None:
            self.wait()
