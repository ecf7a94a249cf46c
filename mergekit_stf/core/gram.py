"""The Gram matrix of all features as an operator (paper, equation 3: ``U ∘ V``).

``G = (UᵀU) ∘ (VᵀV)`` of the stacked features of all tasks is symmetric positive semidefinite with a
unit diagonal, and its diagonal blocks, one a task, are identities. It is never formed as a whole:
``Blocks`` keeps the T(T-1)/2 blocks above the diagonal, which is cheapest for few tasks;
``Products`` keeps nothing and uses ``(G alpha)_k = u_kᵀ M(alpha) v_k``, whose cost and memory are
linear in T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mergekit_stf.core.features import Features

APPLICATIONS = 12
"""Applications of G that a solve is expected to need, for choosing between the two."""


class Gram(Protocol):
    """What the solver needs of G."""

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha`` for a vector over the stacked features, (r,), in its type."""
        ...


class Blocks:
    """G by its off-diagonal blocks ``B_ij = (U_iᵀ U_j) ∘ (V_iᵀ V_j)``, i < j, each (r_i, r_j)."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.sizes = [f.rank for f in features]
        self.blocks = {
            (i, j): (features[i].U.mT @ features[j].U).mul_(features[i].Vh @ features[j].Vh.mT)
            for j in range(len(features))
            for i in range(j)
        }

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        parts = torch.split(alpha, self.sizes)
        result = alpha.clone()
        out = torch.split(result, self.sizes)
        for (i, j), block in self.blocks.items():
            out[i].add_(torch.mv(block, parts[j].to(block.dtype)))
            out[j].add_(torch.mv(block.mT, parts[i].to(block.dtype)))
        return result


class Products:
    """G by two matrix products a task and application: ``M(alpha)``, then ``u_kᵀ M v_k``."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.features = features
        self.sizes = [f.rank for f in features]

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        M = combine(self.features, torch.split(alpha, self.sizes))
        responses = [((M @ f.Vh.mT).mul_(f.U)).sum(dim=0) for f in self.features]
        return torch.cat(responses).to(alpha.dtype)


def combine(features: Sequence[Features], alpha: Sequence[Tensor]) -> Tensor:
    """Assemble ``M = Σ_k alpha_k u_k v_kᵀ`` over all tasks (paper, equation 2), (m, n)."""
    first = features[0]
    M = first.U.new_zeros(first.U.shape[0], first.Vh.shape[1])
    for f, a in zip(features, alpha, strict=True):
        M.addmm_(f.U * a.to(f.U.dtype), f.Vh)
    return M


def gram(features: Sequence[Features]) -> Gram:
    """Choose the cheaper form of G.

    Counted in multiplications: the blocks cost ``r_i r_j (m + n)`` a pair, once; the products cost
    ``2 m n r_i`` a task and application. The blocks must also fit into the memory of the features.
    """
    m, n = features[0].U.shape[0], features[0].Vh.shape[1]
    sizes = [f.rank for f in features]
    pairs = (sum(sizes) ** 2 - sum(r * r for r in sizes)) // 2
    affordable = pairs <= sum(sizes) * max(m, n)
    if affordable and pairs * (m + n) <= APPLICATIONS * 2 * m * n * sum(sizes):
        return Blocks(features)
    return Products(features)
