"""What the driver of a merge and its workers say to each other: values that can be pickled.

A worker gets the host's task of one weight, which names the tensors to read and the parameters;
no tensor and no code travels with it. It answers with the merged tensor and with what it has to
remember of it: the entry of the store, the record, the warnings.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from mergekit.io.tasks import SaveTensor
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_stf.core import Record
from mergekit_stf.host.checkpoints.content import content_of
from mergekit_stf.host.diagnostics.notices import Notice
from mergekit_stf.host.executors.nodes import Expected


@dataclass(frozen=True)
class Packed:
    """A tensor as its bytes, which Ray keeps in shared memory and hands over without a copy.

    Attributes:
        content: the bytes, flat; of a tensor that came from elsewhere they cannot be changed.
        shape: of the tensor.
        dtype: of the tensor.
    """

    content: np.ndarray
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """Pack a tensor, without a copy where it lies in one piece on the CPU."""
        return cls(content_of(tensor.cpu()).numpy(), tuple(tensor.shape), tensor.dtype)

    def tensor(self) -> Tensor:
        """Return a tensor of the same bytes in memory of its own."""
        found = torch.empty(self.shape, dtype=self.dtype)
        content_of(found).numpy()[:] = self.content
        return found


@dataclass(frozen=True)
class Entry:
    """An entry of the store: its key, the matrix, the note about it."""

    key: str
    matrix: Packed
    note: str


@dataclass(frozen=True)
class Merge:
    """What all weights of a merge have in common.

    Attributes:
        number: tells one merge from another, so that a worker opens the files of each anew.
        options: the host's.
        threads: of torch, for one weight.
        expected: what must be the same where a weight is merged as where the merge was started.
        known: the keys in the driver's store.
    """

    number: str
    options: MergeOptions = field(compare=False)
    threads: int = field(compare=False)
    expected: Expected = field(compare=False)
    known: frozenset[str] = field(compare=False)


@dataclass(frozen=True)
class Order:
    """One weight to be merged.

    Attributes:
        task: the host's, of reading, merging and rounding the weight.
        given: the entry of the driver's store, once a worker has asked for it.
        lost: the key of an entry that a worker has asked for and that was damaged.
        stored: whether the driver wants the merged matrix for its store.
    """

    task: SaveTensor
    given: Entry | None = None
    lost: str | None = None
    stored: bool = True


@dataclass(frozen=True)
class Reply:
    """What became of an order.

    Attributes:
        node: where it was merged.
        device: the kind of device that merged it.
        tensor: the weight in the type to write; None where the output has no such weight.
        wanted: the key of an entry in the driver's store, which is all that is missing.
        entries: what the store should keep.
        records: what was done.
        notices: what is to be said once a merge.
        warnings: what the engine has warned of: the text and the category.
    """

    node: str
    device: str
    tensor: Packed | None = None
    wanted: str | None = None
    entries: tuple[Entry, ...] = ()
    records: tuple[Record, ...] = ()
    notices: tuple[Notice, ...] = ()
    warnings: tuple[tuple[str, type[Warning]], ...] = ()
