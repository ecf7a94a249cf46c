"""Features that a float32 eigensolver left mixed, turned apart.

In the found basis the images ``b_k = M v_k`` are graded, so that their products carry each pair of
features with the precision of its own size. The angle by which two of them are mixed, as in
Jacobi's method, is ``tan 2θ_kl = 2 b_kᵀb_l / (b_k² - b_l²)``; all pairs are turned at once, which
converges quadratically (Ogita and Aishima 2018, who take angles to first order). Rounding leaves
an angle of about ``eps s_1 / (s_k - s_l)``, which is small for all but a few pairs of nearly equal
lengths. Those are not turned, since their angles would be noise, of up to half a radian, that
keeps all others from settling: they are told apart in float64, within their span. Rounding tilts
that span by some ``eps``, which enters with its square.
"""

from __future__ import annotations

from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.features.routes import complete, eigen, lower_gram, separate_tail
from mergekit_stf.core.precision import CHUNK, split
from mergekit_stf.core.tolerances import (
    APART,
    CLOSE,
    EQUAL,
    FINE_TAIL,
    LARGEST_TURN,
    RANK,
    SHORT,
    TURNS,
)

BAND = 2**22
"""Entries of a band of rows for which angles are computed at a time."""

TERMS = 256
"""Terms of a float32 product that are summed before float64 takes over, where that matters."""

MOST = 512
"""Features of one run of close lengths that are told apart; a longer run stays as it is found."""


def gram_refined(M: Tensor) -> Features:
    """Diagonalise ``MᵀM`` in float32 and turn mixed features apart (``turning``), to about 1e-5."""
    _, Vh = eigen(lower_gram(M, M.dtype))
    _, Vh = separate_tail(Vh @ M.mT, Vh, FINE_TAIL)
    return complete(*settled(M, Vh), "gram_refined")


def settled(M: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Vh Mᵀ`` and ``Vh`` of the right singular vectors that the rows are mixtures of.

    The merged matrix comes within 1e-5 of that of float64 where some lengths are nearly equal, and
    within 3e-5 where all are, whatever the gaps, unless the spectrum is steep: below ``1e-3 s_1``
    float32 tells less (measured, see ``docs/method.md``). If an eigensolver mixed so much that
    turning does not settle, the last basis is made orthonormal.

    Args:
        M: (m, n).
        Vh: (n, n), nearly orthonormal, rows in the order of their images but for rounding.
    """
    for _ in range(TURNS):
        Vh, largest = turned(images(M, Vh), Vh)
        if largest <= APART:
            break
    else:
        Vh = torch.linalg.qr(Vh.mT).Q.mT
    image = images(M, Vh)
    tell_apart(M, image, Vh)
    return image, Vh


def images(M: Tensor, Vh: Tensor) -> Tensor:
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


def turned(image: Tensor, Vh: Tensor) -> tuple[Tensor, float]:
    """Turn pairs of rows by the angle at which their images are orthogonal.

    Pairs whose lengths differ by less than half of ``CLOSE`` stay for ``tell_apart``, which goes up
    to ``CLOSE``: lengths change a little in between, and no pair is to be missed by both.

    Args:
        image: (n, m), ``Vh Mᵀ``.
        Vh: (n, n), nearly orthonormal.

    Returns:
        The turned rows, orthonormal to second order in the angles, and the largest angle.
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
    share = (LARGEST_TURN / total).clamp(max=1)
    for k in bands:
        cosine[k] *= torch.minimum(share, share[k].unsqueeze(1))
    return torch.addmm(Vh, cosine.add_(excess, alpha=0.5), Vh), float(largest.max())


def tell_apart(M: Tensor, image: Tensor, Vh: Tensor) -> None:
    """Diagonalise ``MᵀM`` in float64 within the span of each run of close features, in place.

    The merged matrix depends on the basis of nearly equal features. They are few: those of random
    4096 × 4096 matrices closer than ``CLOSE`` are 60, whose float64 products any card affords.

    Args:
        M: (m, n).
        image: (n, m), ``Vh Mᵀ``; rows of close features are replaced.
        Vh: (n, n), nearly orthonormal; the same rows are replaced.
    """
    length, order = torch.linalg.vector_norm(image, dim=1).sort(descending=True)
    runs = _close(length)
    ends = accumulate(end - start for start, end in runs)
    for _, batch in groupby(zip(runs, ends, strict=True), lambda pair: pair[1] // MOST):
        spans = [order[start:end] for (start, end), _ in batch]
        rows, sizes = torch.cat(spans), [span.numel() for span in spans]
        V = torch.linalg.qr(Vh[rows].double().mT).Q.mT
        exact = torch.cat([V @ part.double().mT for part in split(M)], dim=1)
        R = _within(sizes, (exact @ exact.mT).cpu()).to(V.device)
        Vh[rows], image[rows] = (R @ V).to(Vh.dtype), (R @ exact).to(image.dtype)


def _close(length: Tensor) -> list[tuple[int, int]]:
    """Return where runs of close lengths start and end, in descending lengths, noise left out."""
    near = (length[1:] > (1 - CLOSE) * length[:-1]) & (length[1:] > RANK * length[0])
    cuts = (torch.nonzero(~near).reshape(-1) + 1).tolist()
    runs = pairwise([0, *cuts, length.numel()])
    return [(start, end) for start, end in runs if 1 < end - start <= MOST]


def _within(sizes: list[int], gram: Tensor) -> Tensor:
    """Return the rotation that diagonalises the diagonal blocks of these sizes, each by itself."""
    R = torch.zeros_like(gram)
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        own = slice(end - size, end)
        R[own, own] = torch.linalg.eigh(gram[own, own]).eigenvectors.mT
    return R
