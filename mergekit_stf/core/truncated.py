"""Leading features without the others: block Krylov, and recognition of a low rank.

Both draw their start from a fixed seed on the CPU, so that every device starts from the same
numbers, and both check their answer and return nothing when it is not good enough.
"""

from __future__ import annotations

from math import ceil, log

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.routes import eigen, lower_gram, separate_tail
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
"""Columns of a block at least, or a 64th of all: M has to be read for fewer, too, as slowly."""

FIRST = 2.2
"""Size of the space, in features wanted, at which convergence is looked for first."""

STEP = 0.25
"""And by how much it grows between looks, if that is a block or more."""

PROBE = 16
"""A rank below ``min(m, n) / PROBE`` is recognised."""

MARGIN = 16
"""Columns of the part that is looked at first, beyond twice that rank."""


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
        self._append(_orthonormal(_start(n, width, M)).mT)

    def grow(self, size: int) -> None:
        """Append blocks up to at least this many rows.

        By the three-term recurrence only the last two blocks have much in common with the next
        one; taken out first, they leave to the full projection what rounding brings back.
        """
        while self.size < size:
            X = _applied(self.adjoint, self.image[self.size - self.width : self.size])
            for start in (max(0, self.size - 2 * self.width), 0):
                known = self.basis[start : self.size]
                X = _orthonormal(torch.addmm(X, X @ known.mT, known, alpha=-1).mT).mT
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
        self.image[rows] = _applied(self.M, X)
        self.size = rows.stop


def _applied(A: Tensor, rows: Tensor) -> Tensor:
    """Return A times each of a few rows, as rows."""
    return (A @ rows.mT.contiguous()).mT


def low_rank(M: Tensor) -> Features | None:
    """Return all features of a matrix of low rank at the cost of its rank, else ``None``.

    A small part of M tells of most matrices that their rank is larger. Else, the triangle of a QR
    decomposition of ``M Ω``, with a Gaussian ``Ω`` of ``n / PROBE`` columns, tells at little cost
    whether the rank is below that. If so, one power step in float64 finds the range, and what it
    leaves of M must be below the tolerance of the numerical rank.

    Args:
        M: (m, n) with m >= n.
    """
    n = M.shape[1]
    if n < SMALLEST or _part_exceeds(M, n // PROBE):
        return None
    Q, R = torch.linalg.qr(M @ _start(n, n // PROBE, M))
    size = R.diagonal().abs()
    if bool(size[-1] > 10 * RANK * size[0]):
        return None
    wide = M.double()
    Q = _orthonormal(wide @ (wide.mT @ Q[:, size > 10 * RANK * size[0]].double()))
    B = Q.mT @ wide
    U, s, Vh = torch.linalg.svd(B, full_matrices=False)
    if bool(_spectral_norm(torch.addmm(wide, Q, B, alpha=-1)) > RANK * s[0]):
        return None
    return Features((Q @ U).to(M), s.to(M), Vh.to(M), "low_rank")


def _part_exceeds(M: Tensor, rank: int) -> bool:
    """Say whether an evenly spaced part of M, little larger than the rank, shows M to exceed it.

    The singular values of a part are no larger than those of the whole. Of ``rank + 1`` rows, all
    exceed ``t`` if the Gram matrix less ``t²`` is positive definite, which a Cholesky factor tells.
    """
    rows = M[:: M.shape[0] // (rank + 1)][: rank + 1]
    part = rows[:, :: max(1, M.shape[1] // (2 * rank + MARGIN))].double()
    noise = RANK * torch.linalg.vector_norm(M).double()
    gram = part @ part.mT
    gram.diagonal().sub_(noise.square())
    return not int(torch.linalg.cholesky_ex(gram).info)


def _start(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(rows, columns, generator=generator).to(like)


def _orthonormal(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X).Q
    return Q


def _spectral_norm(E: Tensor, steps: int = 8) -> Tensor:
    """Estimate the largest singular value by power iteration, from below within a few per cent."""
    x = _start(E.shape[1], 4, E)
    for _ in range(steps):
        x = E.mT @ (E @ x)
        x = x / torch.linalg.vector_norm(x, dim=0).clamp(min=torch.finfo(E.dtype).tiny)
    largest: Tensor = torch.linalg.vector_norm(E @ x, dim=0).max()
    return largest
