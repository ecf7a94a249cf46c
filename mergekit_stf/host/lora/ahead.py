"""Merge the next weights while the last ones are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Result = TypeVar("Result")

AHEAD = 4
"""Weights that are merged before they are written."""


class Ahead(Generic[Result]):
    """The result of each name, computed by a thread of its own while others are written.

    Args:
        names: all of them, about in the order in which they will be taken.
        work: computes the result of one.
    """

    def __init__(self, names: Iterable[str], work: Callable[[str], Result]) -> None:
        self._names, self._work = iter(names), work
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._results: dict[str, Future[Result]] = {}

    def __enter__(self) -> Ahead[Result]:
        """Return the object itself."""
        return self

    def take(self, name: str) -> Result:
        """Return the result of a name."""
        while name not in self._results or len(self._results) <= AHEAD:
            following = next(self._names, None)
            if following is None:
                break
            self._results[following] = self._pool.submit(self._work, following)
        return self._results.pop(name).result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread, at once when the merge has failed."""
        self._pool.shutdown(cancel_futures=True)
