"""Leading features without the others, by a block Krylov method.

It draws its start from a fixed seed on the CPU, so that every device starts from the same numbers,
checks its answer, and returns nothing when that is not good enough.
"""

from __future__ import annotations

from math import ceil, log

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.features.routes import eigen, lower_gram, separate_tail
from mergekit_stf.core.tolerances import BLURRED, RANK, TRUNCATED

SEED = 20250210
SMALLEST = 256
"""Below this smaller side an exact decomposition is as quick."""

LARGEST_FRACTION = 0.3
"""Above this fraction of all features an exact decomposition is as quick."""

LARGEST_SPACE = 0.7
"""A Krylov space beyond this fraction of the smaller side costs more than the exact answer."""

BLOCKS = 16
"""Blocks in which a Krylov space reaches the number of features that are wanted."""

NARROWEST = 32
"""Columns that a block has at least, unless a 64th of all is fewer: a product with fewer takes as
long, since reading M is what takes the time."""

FIRST = 2.2
"""Size of the space, in features wanted, at which convergence is looked for first."""

STEP = 0.25
"""Growth of the space between looks, in features wanted; one block at least."""


def leading(M: Tensor, count: int) -> Features | None:
    """Return the ``count`` leading features of M by a randomised block Krylov method.

    The space of ``X, MᵀM X, (MᵀM)² X, …`` holds the leading right vectors to high accuracy once it
    is about twice as large as their number, unless the spectrum is flat there (Musco and Musco
    2015); narrow blocks, which raise the degree, need the smallest space. It grows until the
    residuals ``Mᵀu_k - s_k v_k`` of all kept triples are below ``TRUNCATED * |s|`` together; the
    error of the merged matrix is then below 1e-3.

    Args:
        M: (m, n) with m >= n.
        count: features wanted.

    Returns:
        The features, or ``None`` if an exact decomposition would be as quick.
    """
    n = M.shape[1]
    if n < SMALLEST or count > LARGEST_FRACTION * n:
        return None
    width = max(ceil(count / BLOCKS), min(NARROWEST, n // 64))
    krylov = _Krylov(M, width, int(LARGEST_SPACE * n))
    first, start, step = 0.0, ceil(FIRST * count), max(width, ceil(STEP * count))
    for size in range(start, int(LARGEST_SPACE * n), step):
        krylov.grow(size)
        found, residual = krylov.ritz(count)
        if residual <= TRUNCATED:
            return found
        if first:
            remaining = log(residual / TRUNCATED) / max(log(first / residual), 1e-9)
            if size + remaining * (size - start) > LARGEST_SPACE * n:
                return None
        first = first or residual
    return None


class _Krylov:
    """An orthonormal basis of a block Krylov space of MᵀM, and its image under M, by rows.

    A copy of ``Mᵀ`` lets both products read their matrix by rows, in four fifths of the time.
    """

    def __init__(self, M: Tensor, width: int, limit: int) -> None:
        m, n = M.shape
        self.M, self.adjoint, self.width, self.size = M.contiguous(), M.mT.contiguous(), width, 0
        self.basis, self.image = M.new_empty(limit + width, n), M.new_empty(limit + width, m)
        self._append(_orthonormalise(_random_rows(n, width, M)).mT)

    def grow(self, size: int) -> None:
        """Append blocks up to at least this many rows.

        By the three-term recurrence only the last two blocks have much in common with the next
        one; taken out first, they leave to the full projection what rounding brings back.
        """
        while self.size < size:
            X = _apply(self.adjoint, self.image[self.size - self.width : self.size])
            for start in (max(0, self.size - 2 * self.width), 0):
                known = self.basis[start : self.size]
                X = _orthonormalise(torch.addmm(X, X @ known.mT, known, alpha=-1).mT).mT
            self._append(X)

    def ritz(self, count: int) -> tuple[Features, float]:
        """Return the leading Ritz triples in the space, and their relative residual."""
        basis, image = self.basis[: self.size], self.image[: self.size]
        squares, R = eigen(lower_gram(image.mT, image.dtype))
        if squares[min(count, self.size) - 1] > BLURRED * squares[0]:
            R = R[:count]
        Uh, Vh = separate_tail(R @ image, R @ basis)
        s, order = torch.linalg.vector_norm(Uh, dim=1).sort(descending=True)
        order = order[: min(count, int(torch.count_nonzero(s > RANK * s[0])))]
        Vh, s = Vh[order], s[: order.numel()]
        Uh = Uh[order].div_(s.unsqueeze(1))
        residual = torch.linalg.vector_norm(torch.addmm(Vh * s.unsqueeze(1), Uh, self.M, beta=-1))
        return Features(Uh.mT, s, Vh, "krylov"), float(residual / torch.linalg.vector_norm(s))

    def _append(self, X: Tensor) -> None:
        rows = slice(self.size, self.size + X.shape[0])
        self.basis[rows] = X
        self.image[rows] = _apply(self.M, X)
        self.size = rows.stop


def _apply(A: Tensor, rows: Tensor) -> Tensor:
    """Return A times each of a few rows, as rows."""
    return (A @ rows.mT.contiguous()).mT


def _random_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(rows, columns, generator=generator).to(like)


def _orthonormalise(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X).Q
    return Q
