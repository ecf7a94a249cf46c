"""Fused projections taken apart into the linear maps that they stack.

Some models keep several linear maps in one matrix: query, key and value of GPT-2 in the columns of
``c_attn``, gate and up of Phi-3 in the rows of ``gate_up_proj``. The paper merges such a matrix
whole, and so does ``stf``. With the parameter ``split`` each map is a matrix of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

FORMAT = re.compile(r"(rows|columns) (\d+(?:,\d+)*)(?: in (\d+))?")


@dataclass(frozen=True)
class Split:
    """Where the linear maps of a fused projection lie.

    Attributes:
        text: as the recipe gives it.
        axis: 0 if the maps are stacked in rows, 1 if in columns.
        sizes: the size of each map within a group, or one number, of equal maps.
        groups: times that the sequence of maps is repeated, as where each attention head has its
            own query, key and value.
    """

    text: str
    axis: int
    sizes: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        """Return the text of the recipe."""
        return self.text

    def indices(self, shape: Sequence[int]) -> Iterator[tuple[slice | Tensor, ...]]:
        """Yield for each linear map the index of its entries in a matrix of this shape.

        Raises:
            ValueError: the sizes do not make up the axis.
        """
        length = shape[self.axis]
        lines = torch.arange(length)
        if length % self.groups == 0:
            sizes = self._sizes(length // self.groups)
            if sum(sizes) * self.groups == length:
                ends = list(accumulate(sizes))
                for start, end in zip([0, *ends], ends, strict=False):
                    index = lines.view(self.groups, -1)[:, start:end].reshape(-1)
                    yield (index,) if self.axis == 0 else (slice(None), index)
                return
        raise ValueError(
            f"`split: {self.text}` does not make up axis {self.axis} of shape {tuple(shape)}; "
            "give a number of equal parts or sizes that add up, and a filter for the right weights"
        )

    def _sizes(self, length: int) -> tuple[int, ...]:
        if len(self.sizes) > 1:
            return self.sizes
        return (length // self.sizes[0],) * self.sizes[0]


def parse_split(value: object) -> Split | None:
    """Read ``none``, ``rows 2``, ``columns 3``, ``rows 32,8,8`` or ``rows 3 in 12``.

    Raises:
        ValueError: what is allowed.
    """
    if value is None or value == "none":
        return None
    if isinstance(value, Split):
        return value
    match = FORMAT.fullmatch(str(value))
    if match is None or "0" in (numbers := match[2].split(",")) or match[3] == "0":
        raise ValueError(
            "must be `none`, or `rows` or `columns` with a number of parts or their sizes, "
            "as `columns 3`, `rows 32,8,8` or `rows 3 in 12` for 12 groups of three"
        )
    sizes = tuple(map(int, numbers))
    return Split(match[0], ("rows", "columns").index(match[1]), sizes, int(match[3] or 1))
