"""The Gram matrix of all features as an operator (paper, equation 3: ``U ∘ V``).

``G = (UᵀU) ∘ (VᵀV)`` of the stacked features of all tasks is symmetric positive semidefinite with a
unit diagonal, and its diagonal blocks, one a task, are identities. It is never formed as a whole:
``Blocks`` keeps the T(T-1)/2 blocks above the diagonal, which is cheapest for few tasks;
``Products`` keeps nothing and uses ``(G alpha)_k = u_kᵀ M(alpha) v_k``, whose cost and memory are
linear in T.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import Protocol

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.precision import split

APPLICATIONS = 12
"""Applications of G that a solve is expected to need, for choosing between the two."""

ROOM = 5 * 2**27
"""Bytes beside the features, and as many as the task matrices take, that a solve may use."""


class Gram(Protocol):
    """What the solver needs of G."""

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha`` for a vector over the stacked features, (r,), in its type."""
        ...


class Blocks:
    """G by its blocks above the diagonal, ``(U_iᵀ U_j) ∘ (V_iᵀ V_j)``, i < j."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.blocks: list[tuple[slice, slice, Tensor]] = []
        for (rows, f), (columns, g) in combinations(zip(spans(features), features, strict=True), 2):
            block = f.U.mT @ g.U
            parts = split(block)
            for part, Vh in zip(parts, torch.split(f.Vh, parts[0].shape[0]), strict=True):
                part *= Vh @ g.Vh.mT
            self.blocks.append((rows, columns, block))

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        result = alpha.clone()
        for rows, columns, block in self.blocks:
            result[rows] += torch.mv(block, alpha[columns].to(block.dtype))
            result[columns] += torch.mv(block.mT, alpha[rows].to(block.dtype))
        return result


class Products:
    """G by two matrix products a task and application: ``M(alpha)``, then ``u_kᵀ M v_k``."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.features = features
        self.sizes = [f.rank for f in features]

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        M = combine(self.features, torch.split(alpha, self.sizes))
        return torch.cat([responses(f, M) for f in self.features]).to(alpha.dtype)


def combine(features: Sequence[Features], alpha: Sequence[Tensor]) -> Tensor:
    """Assemble ``M = Σ_k alpha_k u_k v_kᵀ`` over all tasks (paper, equation 2), (m, n)."""
    first = features[0]
    M = first.U.new_zeros(first.U.shape[0], first.Vh.shape[1])
    for f, a in zip(features, alpha, strict=True):
        M.addmm_(f.U * a.to(f.U.dtype), f.Vh)
    return M


def responses(f: Features, M: Tensor) -> Tensor:
    """Return ``u_kᵀ M v_k`` for each feature of one task, (r,)."""
    return (f.Vh @ M.mT).mul_(f.U.mT).sum(dim=1)


def spans(features: Sequence[Features]) -> list[slice]:
    """Return where each task's features are among the stacked ones."""
    ends = accumulate(f.rank for f in features)
    return [slice(end - f.rank, end) for f, end in zip(features, ends, strict=True)]


def pairs(features: Sequence[Features]) -> int:
    """Return the number of entries of all blocks above the diagonal of G."""
    sizes = [f.rank for f in features]
    return (sum(sizes) ** 2 - sum(r * r for r in sizes)) // 2


def room(features: Sequence[Features]) -> int:
    """Return the bytes that a solve may take beside the features.

    A merge is to take at most three times the size of the task matrices and 1 GB: up to two thirds
    are the features, and a third of the GB is for M and what is formed on the way.
    """
    m, n = features[0].U.shape[0], features[0].Vh.shape[1]
    return ROOM + features[0].s.itemsize * m * n * len(features)


def few(features: Sequence[Features], size: int | None = None) -> bool:
    """Say whether the blocks of G are the cheaper form of it, and there is room for them.

    Counted in multiplications: the blocks cost ``r_i r_j (m + n)`` a pair, once; the products cost
    ``2 m n r_i`` a task and application.

    Args:
        features: of each task.
        size: bytes of the blocks, where they are not of the type of the features.
    """
    m, n = features[0].U.shape[0], features[0].Vh.shape[1]
    count, entries = sum(f.rank for f in features), pairs(features)
    size = features[0].s.itemsize * entries if size is None else size
    return size <= room(features) and entries * (m + n) <= APPLICATIONS * 2 * m * n * count


def blocks_size(m: int, n: int, tasks: int) -> int:
    """Return the bytes of the blocks that are formed of so many m×n matrices in float32, or 0."""
    r = min(m, n)
    U, s, Vh = (torch.empty(shape, device="meta") for shape in ((m, r), (r,), (r, n)))
    alike = [Features(U, s, Vh, "")] * tasks
    return torch.float32.itemsize * pairs(alike) if few(alike) else 0


def gram(features: Sequence[Features]) -> Gram:
    """Choose the cheaper form of G."""
    return Blocks(features) if few(features) else Products(features)
