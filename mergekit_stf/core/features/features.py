"""Task-specific features: the singular triples of a task matrix (STF paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_stf.core.precision import length, scale_by_power
from mergekit_stf.core.tolerances import RANK


@dataclass(frozen=True)
class Features:
    """The features of one task matrix, ``M_i = U diag(s) Vh``.

    Attributes:
        U: (m, r) output features, the left singular vectors.
        s: (r,) singular values, in descending order.
        Vh: (r, n) input features, the right singular vectors, one a row.
        route: the way in which they were found.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    route: str

    @property
    def rank(self) -> int:
        """The number of features, r."""
        return self.s.numel()

    @property
    def norm(self) -> float:
        """The Frobenius norm of the task matrix, ``|s|``, whatever the size of its entries."""
        return length(self.s.double()) if self.rank else 0.0

    @property
    def transposed(self) -> Features:
        """The features of the transposed matrix."""
        return Features(self.Vh.mT, self.s, self.U.mT, self.route)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """The singular values at ``spectrum_ranks``."""
        ranks = torch.tensor(spectrum_ranks(self.rank), device=self.s.device)
        return tuple(self.s[ranks - 1].tolist()) if self.rank else ()

    def times_power(self, exponent: int) -> Features:
        """Return the features of ``2^exponent`` times the matrix."""
        return replace(self, s=scale_by_power(self.s, exponent))

    def leading(self, count: int) -> Features:
        """Return the numerically nonzero ones among the ``count`` leading features."""
        if self.rank:
            count = min(count, int(torch.count_nonzero(self.s > RANK * self.s[0])))
        return Features(self.U[:, :count], self.s[:count], self.Vh[:count], self.route)

    def to(self, dtype: torch.dtype) -> Features:
        """Return the features in another type."""
        return Features(self.U.to(dtype), self.s.to(dtype), self.Vh.to(dtype), self.route)


def combine(features: Sequence[Features], alpha: Sequence[Tensor]) -> Tensor:
    """Assemble ``M = Σ_k alpha_k u_k v_kᵀ`` over all tasks (STF paper, equation 2).

    Args:
        features: of each task, over matrices of one shape (m, n).
        alpha: the weights of each task's features, (r_i,).

    Returns:
        M, (m, n), in the type of the features.
    """
    first = features[0]
    M = first.U.new_zeros(first.U.shape[0], first.Vh.shape[1])
    for f, a in zip(features, alpha, strict=True):
        M.addmm_(f.U * a.to(f.U.dtype), f.Vh)
    return M


def kept_rank(shape: tuple[int, int], rank: float) -> int:
    """Return how many features of an m×n matrix the option ``rank`` keeps.

    A fraction up to 1 keeps ``max(1, floor(rank * min(m, n)))``, a count above 1 keeps as many.

    Raises:
        ValueError: ``rank`` is not a positive number.
    """
    if not rank > 0:
        raise ValueError(f"rank must be a fraction in (0, 1] or a count above 1, got {rank}")
    full = min(shape)
    return int(min(full, rank)) if rank > 1 else max(1, int(rank * full))


def spectrum_ranks(count: int) -> list[int]:
    """Return 16 ranks from 1 to ``count``, spread evenly in the logarithm; none for 0."""
    return [round(count ** (step / 15)) for step in range(16)] if count else []
