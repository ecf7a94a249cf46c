"""Matrices with chosen singular values, and how far a result is from the oracle's."""

import numpy as np
import torch

from tests import oracle

CLOSE = ((20, 21), (90, 91, 92), (180, 181))
BOUND = {
    "svd": 2e-4,  # a float32 SVD blurs close neighbours; that is why it is no default
    "gram_float64": 1e-5,
    "gram_refined": 2e-5,
    "gram_float32": 2e-4,
}


def spectrum(m, n, s, seed):
    """A matrix with these singular values in random bases, formed in float64."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, n, generator=generator).double()).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    return ((U * s) @ V.mT).float()


def with_close_runs(seed, gap, shape=(320, 256)):
    """A matrix of decaying singular values, those of ``CLOSE`` with a small gap between them."""
    s = (1 + torch.arange(shape[1]).double() / 8) ** -0.5
    for run in CLOSE:
        s[list(run)] = s[run[0]] * (1 - gap * torch.arange(len(run)).double())
    return spectrum(*shape, s, seed)


def with_random_gaps(seed, lowest, side=256):
    """A matrix all of whose singular values differ by a random part, 10^lowest to 2e-2 or 3e-4."""
    random = torch.rand(side, generator=torch.Generator().manual_seed(seed)).double()
    gaps = 10 ** (lowest + (1 if lowest > -5 else 5.3) * random)
    return spectrum(side, side, torch.exp(-gaps.cumsum(0)), seed)


def with_equal_lengths(side, spread, seed=3):
    """A matrix whose singular values are equal, or equal but for a part of this size."""
    random = torch.rand(side, generator=torch.Generator().manual_seed(4))
    return spectrum(side + 60, side, 1 + spread * random, seed)


def expected(inputs, rank=None):
    return oracle.superpose([M.double().numpy() for M in inputs], rank)


def distance(result, expected):
    difference = result.double().cpu().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
