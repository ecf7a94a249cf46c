"""Leading features without the others: block Krylov, and recognition of a low rank.

Both draw their start from a fixed seed on the CPU, so that every device starts from the same
numbers, and both check their answer and return nothing when it is not good enough.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.tolerances import RANK, TRUNCATED

SEED = 20250210
SMALLEST = 256
"""Below this smaller side an exact decomposition is as quick."""

LARGEST_FRACTION = 0.3
"""Above this fraction of all features an exact decomposition is as quick."""

LARGEST_SPACE = 0.7
"""A Krylov space beyond this fraction of the smaller side costs more than the exact answer."""

PROBE = 16
"""A rank below ``min(m, n) / PROBE`` is recognised."""


def leading(M: Tensor, count: int) -> Features | None:
    """Return the ``count`` leading features of M by a randomised block Krylov method.

    The space of ``X, MᵀM X, (MᵀM)² X, …`` holds the leading right vectors to high accuracy once it
    is two or three times as large as their number, unless the spectrum is flat there (Musco and
    Musco 2015). It grows until the residuals ``Mᵀu_k - s_k v_k`` of all kept triples are below
    ``TRUNCATED * |s|`` together; the error of the merged matrix is then below 1e-3.

    Args:
        M: (m, n) with m >= n.
        count: features wanted.

    Returns:
        The features, or ``None`` if an exact decomposition would be as quick.
    """
    n = M.shape[1]
    if n < SMALLEST or count > LARGEST_FRACTION * n:
        return None
    width = ceil(count / 4)
    X = _orthonormal(_start(n, width, M))
    basis, image = X, M @ X
    while basis.shape[1] + width <= LARGEST_SPACE * n:
        X = M.mT @ image[:, -width:]
        for _ in range(2):
            X = _orthonormal(torch.addmm(X, basis, basis.mT @ X, alpha=-1))
        basis, image = torch.cat([basis, X], dim=1), torch.cat([image, M @ X], dim=1)
        if basis.shape[1] >= 2 * count + width:
            found, residual = _ritz(M, basis, image, count)
            if residual <= TRUNCATED:
                return found
    return None


def low_rank(M: Tensor) -> Features | None:
    """Return all features of a matrix of low rank at the cost of its rank, else ``None``.

    The triangle of a QR decomposition of ``M Ω``, with a Gaussian ``Ω`` of ``n / PROBE`` columns,
    tells at little cost whether the rank is below that. If so, one power step in float64 finds the
    range, and what it leaves of M must be below the tolerance of the numerical rank.

    Args:
        M: (m, n) with m >= n.
    """
    n = M.shape[1]
    if n < SMALLEST:
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


def _start(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(rows, columns, generator=generator).to(like)


def _orthonormal(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X).Q
    return Q


def _ritz(M: Tensor, basis: Tensor, image: Tensor, count: int) -> tuple[Features, float]:
    """Return the leading Ritz triples in the space of ``basis``, and their relative residual."""
    R = torch.linalg.eigh(image.mT @ image).eigenvectors.flip(1)[:, :count]
    V, B = basis @ R, image @ R
    s = torch.linalg.vector_norm(B, dim=0)
    kept = s > RANK * s[0]
    V, s, U = V[:, kept], s[kept], B[:, kept] / s[kept]
    residual = torch.linalg.vector_norm(M.mT @ U - V * s) / torch.linalg.vector_norm(s)
    return Features(U, s, V.mT, "krylov"), float(residual)


def _spectral_norm(E: Tensor, steps: int = 8) -> Tensor:
    """Estimate the largest singular value by power iteration, from below within a few per cent."""
    x = _start(E.shape[1], 4, E)
    for _ in range(steps):
        x = E.mT @ (E @ x)
        x = x / torch.linalg.vector_norm(x, dim=0).clamp(min=torch.finfo(E.dtype).tiny)
    largest: Tensor = torch.linalg.vector_norm(E @ x, dim=0).max()
    return largest
