"""What a worker carries in the place of a store, a file of records and warnings: all goes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from mergekit_stf.core import Record
from mergekit_stf.host.diagnostics.notices import Notice, Notices
from mergekit_stf.host.executors.messages import Entry, Order, Packed

T = TypeVar("T")


class InStore(Exception):  # noqa: N818 - no error: the driver is asked for an entry
    """The driver's store has the matrix of a weight.

    Attributes:
        key: of its entry.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class CarriedStore:
    """The store of a worker: what it was given, and what it gives back.

    Args:
        order: the weight.
        known: the keys in the driver's store.

    Attributes:
        entries: what the driver should store.
    """

    def __init__(self, order: Order, known: frozenset[str]) -> None:
        self._order, self._known = order, known
        self.entries: list[Entry] = []

    def get(self, key: str, read: Callable[[Tensor, str], T]) -> T | None:
        """Return what ``read`` makes of the entry that came with the order, None without one.

        Raises:
            InStore: the driver has it.
        """
        given = self._order.given
        if given is not None and given.key == key:
            try:
                return read(given.matrix.tensor(), given.note)
            except ValueError:  # forged: it is merged anew
                return None
        if key in self._known and key != self._order.lost:
            raise InStore(key)
        return None

    def put(self, key: str, matrix: Tensor, note: str = "") -> None:
        """Keep an entry for the driver, if it wants it."""
        if self._order.stored:
            self.entries.append(Entry(key, Packed.of(matrix), note))


class CarriedRecords:
    """The records of a worker.

    Attributes:
        records: what was done.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        """Keep a record for the driver."""
        self.records.append(record)


class CarriedNotices(Notices):
    """The notices of a worker.

    Attributes:
        notices: what the driver should say, once a merge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notices: list[Notice] = []

    def say(self, notices: Iterable[Notice]) -> None:
        """Keep notices for the driver."""
        self.notices.extend(notices)
