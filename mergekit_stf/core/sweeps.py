"""``G alpha = s`` for many tasks by block Gauss-Seidel sweeps over the tasks, without G.

With the tasks as blocks ``G = L + I + Lᵀ``: its diagonal blocks are identities, so that a sweep,
``(I + L) z = s - G alpha``, needs no inner solve. It visits the tasks in turn and gives each
feature what its response still lacks, ``z_i = s_i - diag(U_iᵀ (M + Z) V_i)`` and
``Z += U_i diag(z_i) V_iᵀ``, the two products a task of one application of G. The corrections are
made conjugate to earlier ones, so that M is the matrix of their span that is nearest to the answer.

A sweep costs what a step of the Lanczos process does and takes the error much further down. With
``c`` features an entry of M, in general position, what a task lacks at its turn is the noise of the
others' last corrections, ``f_k(t) = c (∫_0^t f_k + ∫_t^1 f_{k-1})`` in squares over the sweep, so
that a sweep multiplies the error by √λ with ``ln λ = c (1 - 1/λ)``, a Lanczos step by √c: 0.19 and
0.35 for 64 tasks of 512×512, 0.10 and 0.22 for 24. The order of the tasks must not change: sweeps
in both directions, or in new orders, converge like the Lanczos process. What sweeps cannot do is to
look at G: a system whose energy shows that it is ill-posed is left to ``solve``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_stf.core.features import Features
from mergekit_stf.core.gram import pairs, responses, room
from mergekit_stf.core.precision import by_power, far_exponent
from mergekit_stf.core.tolerances import RESIDUAL, VERIFIED, WELL_POSED

EXPECTED = 6
"""Sweeps that a system is expected to need, for choosing between them and the blocks of G."""

FEWEST = 12
"""Tasks from which on a correction a sweep is little memory beside their features. Fewer that have
much in common take more sweeps than Lanczos steps."""

PATIENCE = 2
"""Sweeps a task after which a system is given up."""

TINY = torch.finfo(torch.float64).tiny
"""Keeps a correction that is exactly zero from being divided by its length."""


@dataclass(frozen=True)
class Swept:
    """The exact solution of a well-posed system.

    Attributes:
        alpha: weights of the stacked features, (r,) in float64.
        M: the merged matrix ``Σ_k alpha_k u_k v_kᵀ``, (m, n).
        sweeps: how many it took.
        residual: ``|G alpha - s| / |s|``, from the responses of ``M`` themselves.
        condition: ratio of the extreme Ritz values in the span of the corrections, a lower bound
            of the condition of G.
        energy: ``|M|² / Σ|M_i|²``.
    """

    alpha: Tensor
    M: Tensor
    sweeps: int
    residual: float
    condition: float
    energy: float

    def times_power(self, exponent: int) -> Swept:
        """The solution for ``2^exponent`` times the task matrices."""
        alpha, M = by_power(self.alpha, exponent), by_power(self.M, exponent)
        return replace(self, alpha=alpha, M=M)


def worthwhile(features: Sequence[Features]) -> bool:
    """Say whether sweeps are cheaper than forming G's blocks, and their memory affordable."""
    m, n = features[0].U.shape[0], features[0].Vh.shape[1]
    sweeps = EXPECTED * 2 * m * n * sum(f.rank for f in features)
    return len(features) >= FEWEST and pairs(features) * (m + n) > sweeps


def swept(features: Sequence[Features]) -> Swept | None:
    """Solve ``G alpha = s`` where the exact answer is wanted, that is, where it stays short.

    Args:
        features: of each task, over matrices of one shape.

    Returns:
        ``None`` if the energy exceeds ``WELL_POSED``, or if ``PATIENCE`` sweeps a task, or as many
        as there is room for, do not converge.
    """
    if exponent := far_exponent(torch.cat([f.s for f in features])):
        near = swept([f.times_power(-exponent) for f in features])
        return near and near.times_power(exponent)
    dtype = features[0].s.dtype
    square = float(torch.cat([f.s for f in features]).double().square().sum())
    known = _Corrections(features)
    M = torch.zeros_like(known.template)
    alpha = known.target.new_zeros(known.target.shape)
    before = 0.0
    for number in range(1, min(PATIENCE * len(features), room(features) // M.nbytes) + 1):
        p, P = known.conjugate(*_sweep(features, M))
        step = (known.target @ p - _inner(M, P)) / known.squares[-1].clamp(min=TINY)
        alpha += step * p
        M += step.to(dtype) * P
        length, energy = torch.stack([known.squares[-1].sqrt() * step.abs(), _inner(M, M)]).tolist()
        if energy > WELL_POSED * square:
            return None
        change = length / energy**0.5
        left = change * min(1.0, change / before) if before else change
        before = change
        if left <= RESIDUAL[dtype]:
            residual = _residual(features, M) / square**0.5
            if residual <= VERIFIED[dtype]:
                return Swept(alpha, M, number, residual, known.condition(), energy / square)
    return None


class _Corrections:
    """Corrections of ``alpha`` and of ``M``, each conjugate to the others: ``<P_i, P_j> = 0``."""

    def __init__(self, features: Sequence[Features]) -> None:
        first = features[0]
        self.template = first.U.new_empty(first.U.shape[0], first.Vh.shape[1])
        self.target = torch.cat([f.s for f in features]).double()
        self.weights: list[Tensor] = []
        self.matrices: list[Tensor] = []
        self.squares: list[Tensor] = []

    def conjugate(self, z: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Take earlier corrections out of a new one, keep it and return it."""
        for p, P, square in zip(self.weights, self.matrices, self.squares, strict=True):
            share = _inner(Z, P) / square.clamp(min=TINY)
            z = z - share * p
            Z = Z.sub_(share.to(Z.dtype) * P)
        self.weights.append(z)
        self.matrices.append(Z)
        self.squares.append(_inner(Z, Z))
        return z, Z

    def condition(self) -> float:
        """Return the ratio of the extreme Ritz values: in this span G is ``diag(squares)``."""
        present = [i for i, square in enumerate(self.squares) if float(square)]
        scaled = torch.stack([self.weights[i] / self.squares[i].sqrt() for i in present])
        inverse = torch.linalg.eigvalsh((scaled @ scaled.mT).cpu())
        return float(inverse[-1] / inverse[0])


def _sweep(features: Sequence[Features], M: Tensor) -> tuple[Tensor, Tensor]:
    """Return what one sweep adds to ``alpha`` and to ``M``."""
    Z, lacking = torch.zeros_like(M), []
    for f in features:
        z = f.s - responses(f, M + Z)
        Z.addmm_(f.U * z, f.Vh)
        lacking.append(z)
    return torch.cat(lacking).double(), Z


def _residual(features: Sequence[Features], M: Tensor) -> float:
    return float(torch.linalg.vector_norm(torch.cat([f.s - responses(f, M) for f in features])))


def _inner(A: Tensor, B: Tensor) -> Tensor:
    """Return the Frobenius inner product, summed in float64 over rows."""
    product: Tensor = torch.linalg.vecdot(A, B).double().sum()
    return product
