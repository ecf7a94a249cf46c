"""Exact routes from a task matrix to all of its singular triples.

Every route takes a matrix with at least as many rows as columns and returns thin triples in
descending order. The decomposition is what a merge costs. An eigendecomposition of the Gram matrix
``MᵀM`` is cheaper than a singular value decomposition but squares the condition number: float64
hides that, float32 shows it as features that are mixed with their neighbours. ``gram_refined``
undoes the mixing with a few float32 products, so that it needs no float64 on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.tolerances import NEAR, RANK, TAIL

CHUNK = 2**25
"""Entries of a task matrix that are converted to float64 at a time."""


def svd(M: Tensor) -> Features:
    """Decompose by the library's singular value decomposition, in the type of ``M``."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return Features(U, s, Vh, "svd")


def gram_float64(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in float64; error of the merged matrix below 1e-6 for float32 input."""
    V = torch.linalg.eigh(_gram_float64(M)).eigenvectors
    B, square = torch.empty_like(M), V.new_zeros(V.shape[1])
    for target, rows in zip(_split(B), _split(M), strict=True):
        image = rows.double() @ V
        square += image.square().sum(dim=0)
        target.copy_(image)
    s, order = square.sqrt().sort(descending=True)
    order = order[: int(torch.count_nonzero(s > RANK * s[0]))]
    s = s[: order.numel()].to(M.dtype)
    return Features(B[:, order].div_(s), s, V[:, order].to(M.dtype).mT, "gram_float64")


def gram_float32(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in the type of ``M``, its blurred tail again by itself.

    ``M = U diag(s) Vh`` holds to rounding, but close neighbours stay mixed: the merged matrix
    moves by about 1e-5. Meant for inputs whose own rounding moves it by more.
    """
    V = torch.linalg.eigh(M.mT @ M).eigenvectors
    return _complete(*_separate_tail(M @ V, V), "gram_float32")


def gram_refined(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in float32 and turn mixed neighbours apart, all in float32.

    In the found basis ``B = MV`` has columns of graded length, so that ``BᵀB`` carries each pair
    of features with the precision of its own size. First-order perturbation theory then gives the
    remaining rotation, ``E_kl = (BᵀB)_kl / (b_l² - b_k²)`` (Ogita and Aishima 2018 iterate it).
    """
    V = torch.linalg.eigh(M.mT @ M).eigenvectors
    return _complete(*_rotate(*_separate_tail(M @ V, V)), "gram_refined")


ROUTES: dict[str, Callable[[Tensor], Features]] = {
    "svd": svd,
    "gram_float64": gram_float64,
    "gram_float32": gram_float32,
    "gram_refined": gram_refined,
}


def _gram_float64(M: Tensor) -> Tensor:
    gram = torch.zeros(M.shape[1], M.shape[1], dtype=torch.float64, device=M.device)
    for rows in _split(M):
        wide = rows.double()
        gram.addmm_(wide.mT, wide)
    return gram


def _split(M: Tensor) -> tuple[Tensor, ...]:
    return torch.split(M, max(1, CHUNK // M.shape[1]))


def _separate_tail(B: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise again, within its own span, what the rounding of a larger Gram matrix blurs.

    Args:
        B: (m, n), the image ``MV``.
        V: (n, n), orthonormal.

    Returns:
        B and V after the same rotation, in descending order of the columns of B.
    """
    order = torch.linalg.vector_norm(B, dim=0).argsort(descending=True)
    B, V = B[:, order], V[:, order]
    start, top = 0, torch.linalg.vector_norm(B[:, 0])
    while True:
        length = torch.linalg.vector_norm(B[:, start:], dim=0)
        step = int(torch.count_nonzero(length > TAIL * length[0]))
        if start + step >= V.shape[1] or length[0] <= RANK * top or not step:
            return B, V
        start += step
        tail = B[:, start:]
        R = torch.linalg.eigh(tail.mT @ tail).eigenvectors.flip(1)
        B[:, start:] = tail @ R
        V[:, start:] = V[:, start:] @ R


def _rotate(B: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one first-order rotation towards the singular basis, and restore orthonormality."""
    gram = B.mT @ B
    square = gram.diagonal().clone()
    excess = torch.eye(V.shape[1], dtype=V.dtype, device=V.device) - V.mT @ V
    E = (gram + square * excess) / (square - square.unsqueeze(1))
    E = torch.where(E.abs() < NEAR, E, excess / 2)
    E.diagonal().copy_(excess.diagonal() / 2)
    return torch.addmm(B, B, E), torch.addmm(V, V, E)


def _complete(B: Tensor, V: Tensor, route: str) -> Features:
    """Complete orthonormal right vectors to triples: ``B = MV = U diag(s)`` column by column.

    Rounding leaves ``eps * s_1`` in each column of B, much of a short one, and nearly all of it
    along longer ones: one step of Gram-Schmidt takes it out.
    """
    s, order = torch.linalg.vector_norm(B, dim=0).sort(descending=True)
    kept = int(torch.count_nonzero(s > RANK * s[0]))
    start = int(torch.count_nonzero(s > TAIL * s[0]))
    order, s = order[:kept], s[:kept]
    U = B[:, order].div_(s)
    along = (U.mT @ U[:, start:]).triu_(1 - start)
    U[:, start:] -= U @ along
    return Features(U, s, V[:, order].mT, route)
