"""The matrices of which a weight is made: experts of a stack, maps of a fused projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_stf.core import LowRank, STFError
from mergekit_stf.core.low_rank import sum_of
from mergekit_stf.host.merging.split import Split

Index = tuple[int | slice | Tensor, ...]
"""Of a part in the whole: nothing for all of it; an expert; rows; all rows and some columns."""

BLOCK = 2**18
"""Entries of a block of rows, 1 MB in float32: smaller than a core's share of the cache."""


def locate_parts(
    name: str, shape: Sequence[int], split: Split | None, whole: bool = False
) -> Iterator[tuple[Index, str]]:
    """Yield where each matrix of a weight lies, and its name for messages.

    Args:
        name: of the weight.
        shape: of the weight, a matrix or a stack of matrices.
        split: the maps of a fused projection, None where a matrix is merged whole.
        whole: the weight is merged as one, whatever its shape.

    Raises:
        STFError: the weight is neither, or the split does not fit it.
    """
    if whole:
        yield (), name
        return
    if len(shape) not in (2, 3):
        raise STFError(
            f"{name}: only matrices and stacks of matrices are linear maps, got shape "
            f"{tuple(shape)}; set `rule: sum` for this weight"
        )
    stack: list[Index] = [(expert,) for expert in range(shape[0])] if len(shape) == 3 else [()]
    try:
        maps: list[Index] = list(split.indices(shape[-2:])) if split else [()]
    except ValueError as error:
        raise STFError(f"{name}: {error}") from error
    places = [(*expert, *place) for expert in stack for place in maps]
    if len(places) == 1:
        yield places[0], name
    else:
        yield from ((place, f"{name}[{number}]") for number, place in enumerate(places))


def take_part(matrix: Tensor | LowRank, index: Index) -> Tensor | LowRank:
    """Return the part at an index, in factors where the whole is."""
    if isinstance(matrix, Tensor):
        return matrix[index]
    rows, columns = _rows_and_columns(index)
    return LowRank(matrix.left[rows], matrix.right[:, columns])


def part_shape(shape: Sequence[int], index: Index) -> tuple[int, ...]:
    """Return the shape of the part at an index of a weight of this shape."""
    return tuple(torch.empty(tuple(shape), device="meta")[index].shape)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns as which a part is merged: its first axis, and all others."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


class Assembly:
    """A weight put together from its merged parts.

    Args:
        shape: of the weight.

    Attributes:
        M: the whole, in factors where every part is.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.M: Tensor | LowRank = LowRank(torch.zeros(0, 0), torch.zeros(0, 0))

    def put(self, index: Index, M: Tensor | LowRank) -> None:
        """Put a part into its place; what no part covers is zero."""
        if index == ():
            self.M = M.reshape(self.shape) if isinstance(M, Tensor) else M
        elif isinstance(M, LowRank):
            placed = self._place(index, M)
            first = isinstance(self.M, Tensor) or not self.M.rank
            self.M = placed if first else sum_of([self.M, placed])  # type: ignore[list-item]
        else:
            if not isinstance(self.M, Tensor):
                self.M = M.new_zeros(self.shape)
            self.M[index] = M

    def _place(self, index: Index, M: LowRank) -> LowRank:
        rows, columns = _rows_and_columns(index)
        left = M.left.new_zeros(self.shape[0], M.rank)
        right = M.right.new_zeros(M.rank, self.shape[1])
        left[rows], right[:, columns] = M.left, M.right
        return LowRank(left, right)


def add_to_base(
    base: Tensor, M: Tensor | LowRank, scale: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield ``base + scale M``, whole, or in blocks of rows where M is in factors.

    A block is valid until the next one, and stays in the processor's cache until the caller has
    used it.

    Args:
        base: of any floating-point type.
        M: of the shape of the base.
        scale: lambda.
        dtype: the type in which to add.
    """
    if isinstance(M, Tensor):
        yield torch.add(base.to(dtype), M.to(dtype), alpha=scale)
        return
    left, right = (M.left * scale).to(dtype), M.right.to(dtype)
    rows = max(1, BLOCK // max(1, base.shape[1]))
    buffer = torch.empty(min(rows, base.shape[0]), base.shape[1], dtype=dtype, device=base.device)
    for block, factor in zip(torch.split(base, rows), torch.split(left, rows), strict=True):
        yield torch.addmm(block.to(dtype), factor, right, out=buffer[: block.shape[0]])


def _rows_and_columns(index: Index) -> tuple[slice | Tensor, slice | Tensor]:
    rows, columns = (*index, slice(None), slice(None))[:2]
    return rows, columns  # type: ignore[return-value]
