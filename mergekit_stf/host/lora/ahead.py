"""Merge the next weights while the last ones are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

from torch import Tensor

from mergekit_stf.host.lora.merge import AdapterMerger
from mergekit_stf.host.lora.tasks import Delta

AHEAD = 4
"""Weights that are merged before they are written."""


class Ahead:
    """What is added to each weight, computed by a thread of its own while others are written.

    Args:
        merger: merges what the adapters change.
        names: of all weights, about in the order in which they will be taken.
        read: reads a tensor of the base.
    """

    def __init__(
        self, merger: AdapterMerger, names: Iterable[str], read: Callable[[str], Tensor]
    ) -> None:
        self._merger, self._names, self._read = merger, iter(names), read
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._deltas: dict[str, Future[Delta | None]] = {}

    def __enter__(self) -> Ahead:
        """Return the object itself."""
        return self

    def take(self, name: str) -> Delta | None:
        """Return what is added to a weight, None where nothing is."""
        while name not in self._deltas or len(self._deltas) <= AHEAD:
            following = next(self._names, None)
            if following is None:
                break
            base = partial(self._read, following)
            self._deltas[following] = self._pool.submit(self._merger.delta, following, base)
        return self._deltas.pop(name).result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread, at once when the merge has failed."""
        self._pool.shutdown(cancel_futures=True)
