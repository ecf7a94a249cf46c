"""The Gram matrix of all features as an operator (STF paper, equation 3: ``U ∘ V``).

``G = (UᵀU) ∘ (VᵀV)`` of the stacked features of all tasks is symmetric positive semidefinite with a
unit diagonal, and its diagonal blocks, one a task, are identities. It comes in three forms, of
which ``choose_gram`` takes the cheapest: ``Whole`` for few features; ``Blocks`` keeps the T(T-1)/2
blocks above the diagonal; ``Products`` keeps nothing and uses ``(G alpha)_k = u_kᵀ M(alpha) v_k``,
whose cost and memory are linear in T.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import Protocol

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features, combine
from mergekit_stf.core.precision import length, split_rows

FEW = 256
"""Features of all tasks up to which the whole of G is formed: factoring it then costs less than one
step of the Lanczos process."""

APPLICATIONS = 12
"""Applications of G that a solve is expected to need, for choosing between blocks and products."""

ROOM = 5 * 2**27
"""Bytes beside the features, and as many as the task matrices take, that a solve may use."""


class Gram(Protocol):
    """What is asked of G."""

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha`` for a vector over the stacked features, (r,), in its type."""
        ...

    def cosines(self) -> Tensor:
        """Return ``⟨M_i, M_j⟩ / (|M_i| |M_j|)``, (T, T) in float64 on the CPU.

        It is ``s_iᵀ G_ij s_j`` over the lengths, exact and not sampled.
        """
        ...


class Whole:
    """G as it stands, (r, r) in float64, with its exact diagonal."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.features = features
        U, Vh = torch.cat([f.U for f in features], dim=1), torch.cat([f.Vh for f in features])
        self.matrix = ((U.mT @ U) * (Vh @ Vh.mT)).double().fill_diagonal_(1)

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        return torch.mv(self.matrix, alpha.double()).to(alpha.dtype)

    def cosines(self) -> Tensor:
        """Return the cosines between the task matrices."""
        S = self.matrix.new_zeros(len(self.features), self.matrix.shape[0])
        for row, f, span in zip(S, self.features, spans(self.features), strict=True):
            row[span] = unit(f.s)
        inner: Tensor = S @ self.matrix @ S.mT
        return inner.cpu()


class Blocks:
    """G by its blocks above the diagonal, ``(U_iᵀ U_j) ∘ (V_iᵀ V_j)``, i < j."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.features = features
        self.blocks: list[tuple[slice, slice, Tensor]] = []
        for (rows, f), (columns, g) in combinations(zip(spans(features), features, strict=True), 2):
            block = f.U.mT @ g.U
            parts = split_rows(block)
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

    def cosines(self) -> Tensor:
        """Return the cosines between the task matrices."""
        count = len(self.features)
        found = torch.eye(count, dtype=torch.float64)
        units = [unit(f.s) for f in self.features]
        for (i, j), (_, _, block) in zip(combinations(range(count), 2), self.blocks, strict=True):
            found[i, j] = found[j, i] = units[i] @ (block @ units[j].to(block.dtype)).double()
        return found


class Products:
    """G by two matrix products a task and application: ``M(alpha)``, then ``u_kᵀ M v_k``."""

    def __init__(self, features: Sequence[Features]) -> None:
        self.features = features
        self.sizes = [f.rank for f in features]

    def apply(self, alpha: Tensor) -> Tensor:
        """Return ``G alpha``."""
        M = combine(self.features, torch.split(alpha, self.sizes))
        return torch.cat([responses(f, M) for f in self.features]).to(alpha.dtype)

    def cosines(self) -> Tensor:
        """Return the cosines, from as many rows of all tasks at a time as make half a matrix.

        Forming the rows again costs half as much as one application of G.
        """
        count, m = len(self.features), self.features[0].U.shape[0]
        scaled = [f.U * unit(f.s).to(f.U.dtype) for f in self.features]
        found = torch.zeros(count, count, dtype=torch.float64)
        step = max(1, m // (2 * count))
        for start in range(0, m, step):
            part = slice(start, start + step)
            lines = zip(scaled, self.features, strict=True)
            stack = torch.stack([(Us[part] @ f.Vh).reshape(-1) for Us, f in lines]).double()
            found += (stack @ stack.mT).cpu()
        return found


def choose_gram(features: Sequence[Features]) -> Gram:
    """Choose the cheapest form of G.

    Args:
        features: of each task, none of rank 0, over matrices of one shape.
    """
    if sum(f.rank for f in features) <= FEW:
        return Whole(features)
    return Blocks(features) if blocks_pay(features) else Products(features)


def responses(f: Features, M: Tensor) -> Tensor:
    """Return ``u_kᵀ M v_k`` for each feature of one task, (r,)."""
    return (f.Vh @ M.mT).mul_(f.U.mT).sum(dim=1)


def unit(s: Tensor) -> Tensor:
    """Return a vector over its length, in float64, whatever the size of its entries."""
    return s.double() / length(s.double())


def spans(features: Sequence[Features]) -> list[slice]:
    """Return where each task's features are among the stacked ones."""
    ends = accumulate(f.rank for f in features)
    return [slice(end - f.rank, end) for f, end in zip(features, ends, strict=True)]


def count_pairs(features: Sequence[Features]) -> int:
    """Return the number of entries of all blocks above the diagonal of G."""
    sizes = [f.rank for f in features]
    return (sum(sizes) ** 2 - sum(r * r for r in sizes)) // 2


def blocks_pay(features: Sequence[Features]) -> bool:
    """Say whether blocks are cheaper than products, and there is room for them.

    Counted in multiplications: the blocks cost ``r_i r_j (m + n)`` a pair, once; the products cost
    ``2 m n r_i`` a task and application. A merge is to take at most three times the size of the
    task matrices and 1 GB: up to two thirds are the features, and a third of the GB is for M and
    what is formed on the way.
    """
    m, n = features[0].U.shape[0], features[0].Vh.shape[1]
    count, entries = sum(f.rank for f in features), count_pairs(features)
    size = features[0].s.itemsize
    room = ROOM + size * m * n * len(features)
    return size * entries <= room and entries * (m + n) <= APPLICATIONS * 2 * m * n * count


def blocks_size(m: int, n: int, tasks: int) -> int:
    """Return the bytes of the blocks that are formed of so many m×n matrices in float32, or 0."""
    r = min(m, n)
    U, s, Vh = (torch.empty(shape, device="meta") for shape in ((m, r), (r,), (r, n)))
    alike = [Features(U, s, Vh, "")] * tasks
    return torch.float32.itemsize * count_pairs(alike) if blocks_pay(alike) else 0
