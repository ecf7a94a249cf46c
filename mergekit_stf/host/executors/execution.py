"""Who runs the weights of a merge: this process, or a cluster.

A merge is planned by the host as a graph of tasks, one of them for each weight: reading its
tensors, merging them, rounding. An executor runs these tasks, and the host's writer gets the
results in the order of the graph, whoever has computed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.store.store import Store


@dataclass(frozen=True)
class Execution:
    """A merge that has been checked and is about to begin.

    Attributes:
        desk: the records and the notices of the merge; weights that stay here are merged there.
        store: of the desk.
        models: all that the recipe names; the host has them open.
        options: the host's.
        scratch: a folder of the merge's own for what waits to be written.
    """

    desk: Desk
    store: Store
    models: Sequence[ModelReference]
    options: MergeOptions
    scratch: Path


@dataclass
class Devices:
    """The kinds of devices that take part in a merge, by the names of their nodes."""

    kinds: dict[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Return each kind once, sorted; none where all was merged in this process."""
        return tuple(sorted(set(self.kinds.values())))


class Executor(Protocol):
    """Runs the weights of a merge.

    Attributes:
        spools: whether finished weights may wait on the disk until it is their turn.
    """

    spools: bool

    def executing(self, execution: Execution) -> AbstractContextManager[Devices]:
        """Run what the host merges in the block, and say which devices took part."""


class InProcess:
    """The host's own executor: one weight after another in this process, or in its threads."""

    spools = False

    @contextmanager
    def executing(self, execution: Execution) -> Iterator[Devices]:
        """Leave the merge in the block to the host."""
        yield Devices()
