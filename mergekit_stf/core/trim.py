"""Trimming: keep the entries of largest magnitude (paper, Algorithm 2, line 5)."""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor

SAMPLE = 4096


def kept_entries(numel: int, density: float) -> int:
    """Return the number of entries that ``trim`` keeps, ``max(1, floor(density * numel))``."""
    return min(numel, max(1, int(density * numel)))


def trim(x: Tensor, density: float) -> Tensor:
    """Keep the ``max(1, floor(density * numel))`` entries of largest magnitude, zero the others.

    Among equal magnitudes the lower flat index (row-major) is kept, on every device. The time is
    linear in the number of entries.

    Args:
        x: a floating-point tensor of any shape.
        density: the fraction that is kept, in (0, 1]; the paper's ``eta``.

    Returns:
        ``x`` itself if nothing is dropped, a new tensor of the same shape otherwise.

    Raises:
        ValueError: ``density`` is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    k = kept_entries(x.numel(), density)
    if k >= x.numel():
        return x
    magnitude = x.reshape(-1).abs()
    threshold, reaching = kth_largest(magnitude, k)
    below = torch.nextafter(threshold, torch.zeros_like(threshold))
    trimmed = torch.nn.functional.hardshrink(x.contiguous(), below.item())
    surplus = reaching - k
    if surplus > 0:
        ties = torch.nonzero(magnitude == threshold).reshape(-1)
        trimmed.view(-1)[ties[ties.numel() - surplus :]] = 0
    return trimmed


def kth_largest(values: Tensor, k: int) -> tuple[Tensor, int]:
    """Return the ``k``-th largest entry of a vector, and how many entries reach it.

    Selection by a sampled bracket (Floyd and Rivest 1975): an evenly spaced sample brackets the
    answer, one pass keeps the few entries inside the bracket, and the answer is selected among
    them. When the sample misleads, all entries take part; the answer is exact either way.

    Args:
        values: a vector without NaN.
        k: 1 for the largest.

    Returns:
        The entry as a scalar tensor, and the number of entries that are at least as large.
    """
    above = 0
    if values.numel() > 8 * SAMPLE:
        low, high = _bracket(values, k)
        over = values > high
        beyond = int(torch.count_nonzero(over))
        inside = values[(values >= low).logical_xor_(over)]
        if beyond < k <= beyond + inside.numel():
            values, above = inside, beyond
    found = torch.kthvalue(values, values.numel() - (k - above) + 1).values
    return found, above + int(torch.count_nonzero(values >= found))


def _bracket(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return two entries between which the ``k``-th largest lies unless the sample misleads."""
    sample = values[:: values.numel() // SAMPLE].sort(descending=True).values
    fraction = k / values.numel()
    deviation = sqrt(fraction * (1 - fraction) * sample.numel())
    middle, margin = fraction * sample.numel(), ceil(4 * deviation) + 1
    last = sample.numel() - 1
    return (
        sample[min(last, int(middle) + margin)],
        sample[max(0, int(middle) - margin)],
    )
