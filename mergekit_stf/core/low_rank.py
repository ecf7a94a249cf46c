"""A matrix that is known by its factors, as a LoRA update is, and never formed as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ right``.

    Attributes:
        left: (m, r).
        right: (r, n).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of ``left``, an upper bound of the rank of the product."""
        return self.left.shape[1]

    @property
    def norm(self) -> float:
        """Frobenius norm of the product."""
        return math.sqrt(max(0.0, self.inner(self)))

    @property
    def transposed(self) -> LowRank:
        """The transposed product, still in factors."""
        return LowRank(self.right.T, self.left.T)

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product with another product of this shape."""
        left = self.left.double().T @ other.left.double()
        right = self.right.double() @ other.right.double().T
        return float((left * right).sum())

    def times(self, factor: float) -> LowRank:
        """Return ``factor`` times the product."""
        return self if factor == 1 else LowRank(self.left * factor, self.right)

    def dense(self) -> Tensor:
        """Form the product, (m, n), in the type of the factors."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin SVD of the product from its factors, in float64.

        With ``left = Q R`` and ``rightᵀ = P S`` the core ``R Sᵀ`` is r×r, and its SVD ``X s Yᵀ``
        gives ``U = Q X`` and ``Vh = Yᵀ Pᵀ``: O((m + n) r²) operations instead of O(m n min(m, n)).

        Returns:
            U (m, k), s (k,) in descending order, Vh (k, n), with k = min(m, n, r).
        """
        Q, R = torch.linalg.qr(self.left.double())
        P, S = torch.linalg.qr(self.right.double().T)
        X, s, Yh = torch.linalg.svd(R @ S.T, full_matrices=False)
        return Q @ X, s, Yh @ P.T


def sum_of(matrices: Sequence[LowRank]) -> LowRank:
    """Return the sum of the products; its factors are theirs side by side, its rank their sum."""
    if len(matrices) == 1:
        return matrices[0]
    left, right = zip(*((matrix.left, matrix.right) for matrix in matrices), strict=True)
    return LowRank(torch.cat(left, dim=1), torch.cat(right, dim=0))
