"""Float32 means float32, and float64 is taken in portions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 2**25
"""Entries of a task matrix that are converted to float64 at a time."""

FAR = 30
"""Exponents of the largest entry, of either sign, up to which float32 has room for the squares of
all that counts as a feature, and for sums of them."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 products of float32 matrices off inside the block.

    The switch is the whole process's: whoever merges in several threads enters one block around
    all of them.
    """
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(outside)


def split_rows(M: Tensor) -> tuple[Tensor, ...]:
    """Return ``M``, (m, n), as parts of rows of at most ``CHUNK`` entries, one row at least."""
    return torch.split(M, max(1, CHUNK // M.shape[1]))


def far_exponent(M: Tensor) -> int:
    """Return ``e`` with the largest ``|entry|`` of M in ``[2^(e-1), 2^e)``, 0 where ``|e| <= FAR``.

    ``by_power(M, -e)`` has squares that neither overflow nor vanish.
    """
    _, exponent = math.frexp(max(torch.stack(torch.aminmax(M)).abs().tolist()))
    return exponent if abs(exponent) > FAR else 0


def scale_by_power(x: Tensor, exponent: int) -> Tensor:
    """Return ``2^exponent x``, exactly where the type has it; in two steps, as the factor may not.

    Powers of two leave every digit of what is computed as it is.
    """
    first = exponent // 2
    return x * 2.0**first * 2.0 ** (exponent - first) if exponent else x


def length(M: Tensor) -> float:
    """Return the Frobenius norm ``|M|``, whatever the size of the entries."""
    exponent = far_exponent(M)
    return math.ldexp(float(torch.linalg.vector_norm(scale_by_power(M, -exponent))), exponent)
