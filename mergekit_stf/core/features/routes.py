"""Exact routes from a task matrix to all of its singular triples.

Every route takes a matrix with at least as many rows as columns and returns thin triples in
descending order. The decomposition is what a merge costs. An eigendecomposition of the Gram matrix
``MᵀM`` is cheaper than a singular value decomposition but squares the condition number: float64
hides that, float32 shows it as features that are mixed with their neighbours; ``refined`` undoes
the mixing where there is no float64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.precision import split_rows
from mergekit_stf.core.tolerances import ALONG, HEAD, RANK, ROUGH_TAIL, TAIL

Route = Callable[[Tensor], Features]

PANELS = 4
"""Products that form the lower triangle of a Gram matrix, in five eighths of the whole's time."""


def svd(M: Tensor) -> Features:
    """Decompose by the library's singular value decomposition, in the type of ``M``."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return Features(U, s, Vh, "svd")


def gram_float64(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in float64; error of the merged matrix below 1e-6 for float32 input.

    Images that are not short beside the longest are formed in the type of ``M``, whose rounding
    does not show in them.
    """
    values, Vh = eigen(lower_gram(M, torch.float64))
    s = values.clamp(min=0).sqrt()
    head = int(torch.count_nonzero(s > HEAD * s[0]))
    narrow = Vh.to(M.dtype)
    image = M.new_empty(Vh.shape[0], M.shape[0])
    torch.mm(narrow[:head], M.mT, out=image[:head])
    s[:head] = torch.linalg.vector_norm(image[:head], dim=1)
    if head < Vh.shape[0]:
        image[head:], s[head:] = _form_short_images(M, Vh[head:])
    s, order = s.sort(descending=True)
    order = order[: int(torch.count_nonzero(s > RANK * s[0]))]
    s = s[: order.numel()].to(M.dtype)
    Uh = image[order].div_(s.unsqueeze(1))
    return Features(Uh.mT, s, narrow[order], "gram_float64")


def gram_float32(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in the type of ``M``, its blurred tail again by itself.

    ``M = U diag(s) Vh`` holds to rounding, but close neighbours stay mixed: the merged matrix
    moves by about 1e-5. Meant for inputs whose own rounding moves it by more.
    """
    _, Vh = eigen(lower_gram(M, M.dtype))
    return complete_triples(*separate_tail(Vh @ M.mT, Vh, ROUGH_TAIL), "gram_float32")


def eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and, as rows, eigenvectors, largest first, from the lower triangle.

    The matrix is overwritten: at sides of thousands the driver's own copy of it would decide how
    much memory a merge needs. LAPACK reads by columns what torch stores by rows, so that the lower
    triangle is an upper one to it.
    """
    columns = gram.mT
    out = gram.new_empty(gram.shape[0]), columns
    values, vectors = torch.linalg.eigh(columns, UPLO="U", out=out)
    return values.flip(0), vectors.mT.flip(0)


def lower_gram(M: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``MᵀM`` in a type, its lower triangle by ``PANELS`` products; the rest is zero."""
    n = M.shape[1]
    gram = torch.zeros(n, n, dtype=dtype, device=M.device)
    edges = [n * i // PANELS for i in range(PANELS + 1)]
    for rows in split_rows(M):
        wide = rows.to(dtype)
        for start, end in pairwise(edges):
            gram[start:end, :end].addmm_(wide[:, start:end].mT, wide[:, :end])
    return gram


def _form_short_images(M: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Vh Mᵀ`` rounded to the type of ``M``, and its row norms, both from float64."""
    image, square = M.new_empty(Vh.shape[0], M.shape[0]), Vh.new_zeros(Vh.shape[0])
    parts = split_rows(M)
    targets = torch.split(image.mT, [rows.shape[0] for rows in parts])
    for target, rows in zip(targets, parts, strict=True):
        part = Vh @ rows.double().mT
        square += part.square().sum(dim=1)
        target.copy_(part.mT)
    return image, square.sqrt()


def separate_tail(image: Tensor, Vh: Tensor, below: float = TAIL) -> tuple[Tensor, Tensor]:
    """Diagonalise again, within its own span, what the rounding of a larger Gram matrix blurs.

    Args:
        image: (n, m), ``Vh Mᵀ``, one ``b_kᵀ = (M v_k)ᵀ`` a row, in the order of their lengths but
            for rounding.
        Vh: (n, n), orthonormal.
        below: length, relative to the longest image, under which images count as blurred.

    Returns:
        Both after the same rotation of rows, again in that order.
    """
    start, top = 0, torch.linalg.vector_norm(image, dim=1).max()
    while True:
        length = torch.linalg.vector_norm(image[start:], dim=1)
        longest = length.max()
        step = int(torch.count_nonzero(length > below * longest))
        if start + step >= Vh.shape[0] or longest <= RANK * top or not step:
            return image, Vh
        start += step
        tail = image[start:]
        _, R = eigen(tail @ tail.mT)
        image[start:] = R @ tail
        Vh[start:] = R @ Vh[start:]


def complete_triples(image: Tensor, Vh: Tensor, route: str) -> Features:
    """Complete orthonormal right vectors to triples, ``M v_k = s_k u_k``.

    Rounding leaves ``eps * s_1`` in each image, much of a short one, and nearly all of it along
    longer ones: one step of Gram-Schmidt takes it out.
    """
    s, order = torch.linalg.vector_norm(image, dim=1).sort(descending=True)
    kept = int(torch.count_nonzero(s > RANK * s[0]))
    start = int(torch.count_nonzero(s > ALONG * s[0]))
    order, s = order[:kept], s[:kept]
    Uh = image[order].div_(s.unsqueeze(1))
    along = (Uh @ Uh[start:].mT).triu_(1 - start)
    Uh[start:] -= along.mT @ Uh
    return Features(Uh.mT, s, Vh[order], route)
