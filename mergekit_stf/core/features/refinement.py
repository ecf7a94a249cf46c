"""Singular vectors that a float32 eigensolver left mixed, refined to the accuracy of float32.

The rows of ``Vh`` that a float32 eigensolver returns are nearly right singular vectors of M, but
neighbours are mixed with each other. Their images ``b_k = M v_k`` tell by how much: two of them are
orthogonal after a rotation by the angle θ_kl of Jacobi's method,
``tan 2θ_kl = 2 b_kᵀb_l / (b_k² - b_l²)``. All pairs are rotated at once, which converges
quadratically (Ogita and Aishima 2018, who take the angles to first order).

Rounding adds about ``eps s_1 / (s_k - s_l)`` to an angle, which is little unless the two singular
values are nearly equal. Such pairs are not rotated, since their angles would be noise, and the
others would never settle. They are separated in float64, within their span.
"""

from __future__ import annotations

from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.features.routes import complete_triples, eigen, lower_gram, separate_tail
from mergekit_stf.core.precision import CHUNK, split_rows
from mergekit_stf.core.tolerances import (
    CLOSE,
    EQUAL,
    FINE_TAIL,
    LARGEST_ROTATION,
    MAX_SWEEPS,
    RANK,
    SHORT,
    SMALL_ANGLE,
)

BAND = 2**22
"""Entries of a band of rows for which angles are computed at a time."""

TERMS = 256
"""Terms of a float32 product that are summed before float64 takes over, where that matters."""

ORTHONORMAL = 2.5e-7
"""Inner products of vectors below this are rounding, whose correction would spoil short images."""

MOST = 512
"""Features of one run of close lengths that are separated; a longer run stays as it is found."""


def gram_refined(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in float32 and refine the vectors; the merged matrix errs by 1e-5."""
    _, Vh = eigen(lower_gram(M, M.dtype))
    _, Vh = separate_tail(Vh @ M.mT, Vh, FINE_TAIL)
    return complete_triples(*refine_vectors(M, Vh), "gram_refined")


def refine_vectors(M: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the right singular vectors of which the rows of ``Vh`` are mixtures.

    The merged matrix comes within 1e-5 of that of float64, within 3e-5 where all lengths are nearly
    equal, and less near for a steep spectrum (measured, see ``docs/method.md``). What a long run of
    close lengths leaves of inner products is taken out to first order at the end.

    Args:
        M: (m, n).
        Vh: (n, n), nearly orthonormal, rows in the order of their images but for rounding.

    Returns:
        The images ``Vh Mᵀ``, (n, m), and the vectors as the rows of ``Vh``.
    """
    for _ in range(MAX_SWEEPS):
        Vh, largest = rotate_pairs(form_images(M, Vh), Vh)
        if largest <= SMALL_ANGLE:
            break
    else:
        Vh = torch.linalg.qr(Vh.mT).Q.mT
    image = form_images(M, Vh)
    separate_close(M, image, Vh)
    excess = hardshrink(Vh @ Vh.mT - torch.eye(len(Vh)).to(Vh), ORTHONORMAL)
    return image.addmm(excess, image, alpha=-0.5), Vh.addmm(excess, Vh, alpha=-0.5)


def form_images(M: Tensor, Vh: Tensor) -> Tensor:
    """Return ``Vh Mᵀ``, the short images from products of few terms that are summed in float64.

    A float32 sum errs by its largest term, which is as long as M and not as its image.
    """
    image = Vh @ M.mT
    length = torch.linalg.vector_norm(image, dim=1)
    short = torch.nonzero(length < SHORT * length.max()).reshape(-1)
    for rows in torch.split(short, max(1, CHUNK // M.shape[0])):
        parts = zip(torch.split(Vh[rows], TERMS, 1), torch.split(M, TERMS, 1), strict=True)
        exact = torch.zeros(rows.numel(), M.shape[0], dtype=torch.float64, device=M.device)
        for v, part in parts:
            exact += v @ part.mT
        image[rows] = exact.to(M.dtype)
    return image


def rotate_pairs(image: Tensor, Vh: Tensor) -> tuple[Tensor, float]:
    """Rotate all pairs of rows at once, each by the angle that makes its images orthogonal.

    Pairs whose lengths differ by less than half of ``CLOSE`` are left to ``separate_close``, which
    goes up to ``CLOSE``: lengths change a little in between, and no pair may be missed by both.

    Args:
        image: (n, m), ``Vh Mᵀ``.
        Vh: (n, n), nearly orthonormal.

    Returns:
        The rotated rows, orthonormal to second order in the angles, and the largest angle.
    """
    length = torch.linalg.vector_norm(image, dim=1)
    length = length.clamp(min=max(float(RANK * length.max()), torch.finfo(length.dtype).tiny))
    floor = CLOSE / 2 + EQUAL * length.max() / length
    cosine, excess = image @ image.mT, Vh @ Vh.mT
    excess.neg_().diagonal().add_(1)
    total, largest = torch.empty_like(length), torch.zeros_like(length)
    size, step = Vh.shape[0], max(1, BAND // Vh.shape[0])
    bands = [slice(start, min(size, start + step)) for start in range(0, size, step)]
    for k in bands:
        ratio = length / length[k].unsqueeze(1)
        gap, mean = 1 / ratio - ratio, (ratio + 1 / ratio) / 2
        coupling = cosine[k] / length / length[k].unsqueeze(1) + mean * excess[k]
        angle = torch.atan(2 * coupling / gap) / 2
        angle.masked_fill_(gap.abs() <= floor + floor[k].unsqueeze(1), 0)
        total[k], largest[k] = angle.abs().sum(1), angle.abs().amax(1)
        cosine[k] = angle
    share = (LARGEST_ROTATION / total).clamp(max=1)
    for k in bands:
        cosine[k] *= torch.minimum(share, share[k].unsqueeze(1))
    return torch.addmm(Vh, cosine.add_(excess, alpha=0.5), Vh), float(largest.max())


def separate_close(M: Tensor, image: Tensor, Vh: Tensor) -> None:
    """Diagonalise ``MᵀM`` in float64 within the span of each run of close features, in place.

    The merged matrix depends on their basis. They are few: 60 of random 4096 × 4096 matrices.

    Args:
        M: (m, n).
        image: (n, m), ``Vh Mᵀ``; rows of close features are replaced.
        Vh: (n, n), nearly orthonormal; the same rows are replaced.
    """
    length, order = torch.linalg.vector_norm(image, dim=1).sort(descending=True)
    runs = _find_close_runs(length)
    ends = accumulate(end - start for start, end in runs)
    for _, batch in groupby(zip(runs, ends, strict=True), lambda pair: pair[1] // MOST):
        spans = [order[start:end] for (start, end), _ in batch]
        rows, sizes = torch.cat(spans), [span.numel() for span in spans]
        V = torch.linalg.qr(Vh[rows].double().mT).Q.mT
        exact = torch.cat([V @ part.double().mT for part in split_rows(M)], dim=1)
        R = _diagonalise_blocks(sizes, (exact @ exact.mT).cpu()).to(V.device)
        Vh[rows], image[rows] = (R @ V).to(Vh.dtype), (R @ exact).to(image.dtype)


def _find_close_runs(length: Tensor) -> list[tuple[int, int]]:
    """Return where runs of close lengths start and end, in descending lengths, noise left out."""
    near = (length[1:] > (1 - CLOSE) * length[:-1]) & (length[1:] > RANK * length[0])
    cuts = (torch.nonzero(~near).reshape(-1) + 1).tolist()
    return [(a, b) for a, b in pairwise([0, *cuts, length.numel()]) if 1 < b - a <= MOST]


def _diagonalise_blocks(sizes: list[int], gram: Tensor) -> Tensor:
    """Return the rotation that diagonalises the diagonal blocks of these sizes, each by itself."""
    R = torch.zeros_like(gram)
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        own = slice(end - size, end)
        R[own, own] = torch.linalg.eigh(gram[own, own]).eigenvectors.mT
    return R
