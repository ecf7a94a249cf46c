"""Task matrices that are known by their factors, merged without ever forming them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_stf.core.decompose import decompose
from mergekit_stf.core.features import Features, kept_rank
from mergekit_stf.core.precision import full_precision
from mergekit_stf.core.solve import Solution, solve
from mergekit_stf.core.tolerances import RESIDUAL, WELL_POSED

DIRECT = 256
"""Features of all tasks up to which the whole ``G`` is formed and factored."""

BLOCK = 2**18
"""Entries of a block of rows, 1 MB in float32: smaller than a core's share of the cache."""


Index = tuple[slice | Tensor, ...]
"""Of rows, or of all rows and some columns."""


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ right``.

    Attributes:
        left: (m, r).
        right: (r, n).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of ``left``, an upper bound of the rank of the product."""
        return self.left.shape[1]

    @property
    def norm(self) -> float:
        """Frobenius norm of the product."""
        return math.sqrt(max(0.0, self.inner(self)))

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product with another product of this shape."""
        left = self.left.double().T @ other.left.double()
        right = self.right.double() @ other.right.double().T
        return float((left * right).sum())

    def part(self, index: Index) -> LowRank:
        """Return the rows or columns at an index, still in factors."""
        rows, columns = _rows_and_columns(index)
        return LowRank(self.left[rows], self.right[:, columns])

    def placed(self, index: Index, shape: tuple[int, int]) -> LowRank:
        """Return a matrix of this shape that holds the product at an index, and zeros elsewhere."""
        rows, columns = _rows_and_columns(index)
        left = self.left.new_zeros(shape[0], self.rank)
        right = self.right.new_zeros(self.rank, shape[1])
        left[rows], right[:, columns] = self.left, self.right
        return LowRank(left, right)

    @property
    def transposed(self) -> LowRank:
        """The transposed product, still in factors."""
        return LowRank(self.right.T, self.left.T)

    def scaled(self, factor: float) -> LowRank:
        """Return ``factor`` times the product."""
        return self if factor == 1 else LowRank(self.left * factor, self.right)

    def dense(self) -> Tensor:
        """Form the product, (m, n), in the type of the factors."""
        return self.left @ self.right

    def added_to(self, base: Tensor) -> Iterator[Tensor]:
        """Yield ``base + left @ right`` in blocks of rows, each (k, n) and valid until the next.

        The type is float32, float64 for a float64 base. A block stays in the processor's cache
        from the product until the caller has used it.

        Args:
            base: (m, n), of any floating-point type.
        """
        compute = torch.promote_types(base.dtype, torch.float32)
        left, right = self.left.to(compute), self.right.to(compute)
        rows = max(1, BLOCK // max(1, base.shape[1]))
        buffer = torch.empty(min(rows, base.shape[0]), base.shape[1], dtype=compute)
        for part, factor in zip(torch.split(base, rows), torch.split(left, rows), strict=True):
            yield torch.addmm(part.to(compute), factor, right, out=buffer[: part.shape[0]])


@dataclass(frozen=True)
class FactoredSuperposition:
    """The merged matrix in factors, and how the system was solved.

    Attributes:
        M: the merged matrix.
        features: of each task, of one type; of rank 0 where a task matrix is zero.
        gram: ``G`` of the stacked features, (r, r) in float64, where it is small.
        solution: of the system, None where every task matrix is zero.
    """

    M: LowRank
    features: tuple[Features, ...]
    gram: Tensor | None
    solution: Solution | None


def _rows_and_columns(index: Index) -> tuple[slice | Tensor, slice | Tensor]:
    rows, columns = (*index, slice(None))[:2]
    return rows, columns


def sum_of(matrices: Sequence[LowRank]) -> LowRank:
    """Return the sum of the products; its factors are theirs side by side, its rank their sum."""
    if len(matrices) == 1:
        return matrices[0]
    return LowRank(
        torch.cat([matrix.left for matrix in matrices], dim=1),
        torch.cat([matrix.right for matrix in matrices], dim=0),
    )


def factored_svd(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``left @ right`` from its factors, in float64.

    With ``left = Q R`` and ``rightᵀ = P S`` the core ``R Sᵀ`` is r×r, and its SVD ``X s Yᵀ`` gives
    ``U = Q X`` and ``Vh = Yᵀ Pᵀ``: O((m + n) r²) operations instead of O(m n min(m, n)).

    Returns:
        U (m, k), s (k,) in descending order, Vh (k, n), with k = min(m, n, r).
    """
    Q, R = torch.linalg.qr(matrix.left.double())
    P, S = torch.linalg.qr(matrix.right.double().T)
    X, s, Yh = torch.linalg.svd(R @ S.T, full_matrices=False)
    return Q @ X, s, Yh @ P.T


def factored_features(matrix: LowRank, rank: float = 1.0) -> Features:
    """Return the task-specific features of a task matrix that is known by its factors.

    Args:
        matrix: the task matrix.
        rank: leading features kept, as `mergekit_stf.core.features.kept_rank` counts them.

    Returns:
        The features in float64, without those that are numerically zero.
    """
    U, s, Vh = factored_svd(matrix)
    return Features(U, s, Vh, "factored").leading(kept_rank(matrix.shape, rank))


def superpose_factors(
    matrices: Sequence[LowRank | Tensor],
    *,
    rank: float = 1.0,
    ridge: float | None = None,
    source_dtype: torch.dtype = torch.float32,
    name: str = "",
) -> FactoredSuperposition:
    """Merge task matrices as `mergekit_stf.core.superpose.superpose` does, and keep the factors.

    ``M = Σ_k α_k u_k v_kᵀ`` (the paper's equation 2) comes as ``U diag(α)`` and ``Vᵀ``, of rank
    ``Σ_i r_i``.

    Args:
        matrices: at least one, each (m, n), known by its factors or as a whole.
        rank: leading features of each task to keep.
        ridge: regularisation of the solve; ``None`` decides by itself.
        source_dtype: type of the checkpoints, for the decomposition of whole matrices.
        name: of the weight, for warnings and errors.
    """
    with full_precision(), torch.no_grad():
        found = _of_one_type([_features(M, rank, source_dtype, name) for M in matrices])
        features = [f for f in found if f.rank]
        if not features:
            nothing = LowRank(found[0].U[:, :0], found[0].Vh[:0])
            return FactoredSuperposition(nothing, found, None, None)
        U = torch.cat([f.U for f in features], dim=1)
        Vh = torch.cat([f.Vh for f in features])
        G = gram_matrix(U, Vh) if U.shape[1] <= DIRECT else None
        solution = _direct(features, G) if G is not None and ridge is None else None
        solution = solution or solve(features, ridge)
        if not solution.converged:
            warnings.warn(
                f"{name}: the solve stopped at a relative residual of {solution.residual:.1e}; "
                "set `ridge: 0.01` for this weight",
                RuntimeWarning,
                stacklevel=2,
            )
        return FactoredSuperposition(LowRank(U * torch.cat(solution.alpha), Vh), found, G, solution)


def _features(
    matrix: LowRank | Tensor, rank: float, source_dtype: torch.dtype, name: str
) -> Features:
    if isinstance(matrix, LowRank):
        return factored_features(matrix, rank)
    return decompose(matrix, rank, source_dtype=source_dtype, name=name)


def gram_matrix(U: Tensor, Vh: Tensor) -> Tensor:
    """Return ``G = (UᵀU) ∘ (VᵀV)`` of features, (r, r) in float64, with its exact diagonal."""
    G = ((U.mT @ U) * (Vh @ Vh.mT)).double()
    return G.fill_diagonal_(1)


def _direct(features: Sequence[Features], G: Tensor) -> Solution | None:
    """Solve a small system by a Cholesky factorisation of the whole ``G``.

    This costs less than one step of the Lanczos process, which tells more about the system.

    Args:
        features: of each task.
        G: of all features, (r, r) in float64.

    Returns:
        The exact solution, or None where the system is so ill-posed that the exact solution may
        not be wanted.
    """
    s = torch.cat([f.s for f in features])
    factor, failure = torch.linalg.cholesky_ex(G)
    target = s.double()
    alpha = torch.cholesky_solve(target.unsqueeze(1), factor).squeeze(1)
    missed = torch.linalg.vector_norm(torch.mv(G, alpha) - target)
    square, answer, rest = torch.stack([target @ target, target @ alpha, missed]).tolist()
    energy, residual = answer / square, rest / math.sqrt(square)
    if failure or not residual <= RESIDUAL[s.dtype] or energy > WELL_POSED:
        return None
    pivots = factor.diagonal()
    return Solution(
        alpha=torch.split(alpha.to(s.dtype), [f.rank for f in features]),
        iterations=0,
        residual=residual,
        converged=True,
        condition=float((pivots.max() / pivots.min()).square()),
        energy=energy,
        ridge=0.0,
        cutoff=0.0,
    )


def _of_one_type(features: Sequence[Features]) -> tuple[Features, ...]:
    """Bring float64 features of factors to the type of the features of whole matrices."""
    dtype = min((f.s.dtype for f in features), key=lambda dtype: dtype.itemsize)
    return tuple(Features(f.U.to(dtype), f.s.to(dtype), f.Vh.to(dtype), f.route) for f in features)


def truncated(matrix: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation of at most this rank, and its error.

    Returns:
        the approximation (Eckart-Young), and the Frobenius norm of what was dropped.
    """
    U, s, Vh = factored_svd(matrix)
    dropped = float(torch.linalg.vector_norm(s[rank:]))
    return LowRank(U[:, :rank] * s[:rank], Vh[:rank]), dropped
