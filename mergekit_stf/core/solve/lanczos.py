"""The linear system ``G alpha = s`` (STF paper, Theorem 1), by the Lanczos process.

``G`` is a Gram matrix, so one Krylov space from ``s`` serves every purpose: the exact solution
(its Ritz form is the conjugate gradient method), a ridge, the damping of contradicting directions,
the condition and the check of convergence. With ``T_k = QᵀGQ`` tridiagonal and ``q_1 = s / |s|``,
``alpha = |s| Q f(T_k) e_1`` for ``f(x) = 1/x``, ``1/(x + ridge)``, or a damped ``1/x``.

An ill-posed system is told by its energy, ``nu = sᵀ G⁻¹ s / sᵀs = |M|² / Σ|M_i|²``: near-duplicates
that contradict each other raise it without bound, unrelated and agreeing tasks keep it near 1. Up
to ``WELL_POSED`` the answer is exact; above, eigenvalues of G below a cut-off ``tau`` are damped by
``f(x) = (1 - exp(-(x/tau)⁴)) / x``, where ``tau`` rises continuously from 0 to ``CUTOFF``. Along a
damped direction the tasks ask for incompatible responses to nearly the same feature, and get none
beyond what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_stf.core.precision import length
from mergekit_stf.core.solve.gram import Gram
from mergekit_stf.core.solve.solution import Solution
from mergekit_stf.core.tolerances import CUTOFF, ILL_POSED, MAX_ITERATIONS, WELL_POSED


def krylov_solve(operator: Gram, s: Tensor, ridge: float | None, tolerance: float) -> Solution:
    """Solve ``G alpha = s``, or ``(G + ridge I) alpha = s``, in one Krylov space.

    Args:
        operator: G.
        s: the right-hand side, (r,) in float64.
        ridge: added to the diagonal of G; ``None`` adds none and damps ill-posed systems.
        tolerance: relative residual at which the answer is good enough.
    """
    scale = length(s)
    krylov = Lanczos(operator, s / scale, tolerance)
    outcome = _solve_damped(krylov) if ridge is None else _solve_with_ridge(krylov, ridge)
    return Solution(
        alpha=krylov.expand(outcome.coefficients) * scale,
        iterations=krylov.steps,
        residual=outcome.residual,
        converged=outcome.converged,
        condition=krylov.condition,
        energy=krylov.energy(),
        ridge=ridge or 0.0,
        cutoff=outcome.cutoff,
    )


class Lanczos:
    """Orthonormal basis Q of the Krylov space of G from ``start``, and T = QᵀGQ, step by step.

    Vectors are float64 and orthogonalised against all earlier ones, twice: r numbers a step, small
    beside the product with G. T lives on the CPU.
    """

    def __init__(self, operator: Gram, start: Tensor, tolerance: float) -> None:
        self.operator = operator
        self.tolerance = tolerance
        self.basis = start.new_empty(16, start.numel())
        self.basis[0] = start
        self.steps = 0
        self.T = torch.zeros(MAX_ITERATIONS + 1, MAX_ITERATIONS + 1, dtype=torch.float64)

    def step(self) -> float:
        """Append one vector and return its length before normalisation (0 ends the space)."""
        k = self.steps
        w = self.operator.apply(self.basis[k])
        known = self.basis[: k + 1]
        first = known @ w
        w = w - known.mT @ first
        second = known @ w
        w = w - known.mT @ second
        length = torch.linalg.vector_norm(w)
        diagonal, beta = torch.stack([first[k] + second[k], length]).tolist()
        self.T[k, k] = diagonal
        self.steps += 1
        if beta > self.tolerance * self.T[0, 0].abs().clamp(min=self.tolerance):
            self.T[k, k + 1] = self.T[k + 1, k] = beta
            self._append(w / beta)
            return float(beta)
        return 0.0

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (k,) and eigenvectors (k, k) of T."""
        k = self.steps
        values, vectors = torch.linalg.eigh(self.T[:k, :k])
        return values, vectors

    def apply_function(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the coefficients ``f(T) e_1`` in the basis, (k,)."""
        values, vectors = self.ritz()
        return vectors @ (f(values) * vectors[0])

    def energy(self) -> float:
        """Return ``e_1ᵀ T⁻¹ e_1``, which rises to ``sᵀ G⁻¹ s / sᵀs`` step by step."""
        values, vectors = self.ritz()
        return float((vectors[0].square() / values.clamp(min=1e-14)).sum())

    @property
    def condition(self) -> float:
        """The ratio of the largest to the smallest Ritz value."""
        values, _ = self.ritz()
        return float(values[-1] / values[0].clamp(min=1e-14))

    def expand(self, coefficients: Tensor) -> Tensor:
        """Return the vector with these coefficients in the basis, (r,)."""
        known = self.basis[: coefficients.numel()]
        return known.mT @ coefficients.to(known.device)

    def _append(self, vector: Tensor) -> None:
        if self.steps == self.basis.shape[0]:
            self.basis = torch.cat([self.basis, torch.empty_like(self.basis)])
        self.basis[self.steps] = vector


@dataclass(frozen=True)
class _Outcome:
    coefficients: Tensor
    residual: float
    converged: bool
    cutoff: float = 0.0


def _solve_with_ridge(krylov: Lanczos, ridge: float) -> _Outcome:
    """Solve ``(G + ridge I) alpha = s`` to the tolerance, without damping."""
    while True:
        beta = krylov.step()
        y = krylov.apply_function(lambda x: 1 / (x.clamp(min=0) + ridge).clamp(min=1e-14))
        residual = beta * abs(float(y[-1]))
        if residual <= krylov.tolerance or not beta or krylov.steps == MAX_ITERATIONS:
            return _Outcome(y, residual, residual <= krylov.tolerance)


def _solve_damped(krylov: Lanczos) -> _Outcome:
    """Solve exactly where the energy stays small, and damp where it does not."""
    while True:
        beta = krylov.step()
        y = krylov.apply_function(lambda x: 1 / x.clamp(min=1e-14))
        residual = beta * abs(float(y[-1]))
        solved = residual <= krylov.tolerance or not beta
        if solved or krylov.energy() >= ILL_POSED or krylov.steps == MAX_ITERATIONS:
            break
    cutoff = choose_cutoff(krylov.energy())
    if not cutoff:
        return _Outcome(y, residual, solved)
    previous = krylov.apply_function(lambda x: filter_inverse(x, cutoff))
    while beta and krylov.steps < MAX_ITERATIONS:
        beta = krylov.step()
        y = krylov.apply_function(lambda x: filter_inverse(x, cutoff))
        change = y.clone()
        change[:-1] -= previous
        if float(torch.linalg.vector_norm(change)) <= krylov.tolerance:
            return _Outcome(y, _residual(krylov, y), True, cutoff)
        previous = y
    return _Outcome(previous, _residual(krylov, previous), not beta, cutoff)


def choose_cutoff(energy: float) -> float:
    """Return the cut-off ``tau`` for an energy, continuous with a continuous slope."""
    x = min(1.0, max(0.0, (energy - WELL_POSED) / (ILL_POSED - WELL_POSED)))
    return CUTOFF * x * x * (3 - 2 * x)


def filter_inverse(x: Tensor, cutoff: float) -> Tensor:
    """Return ``(1 - exp(-(x/cutoff)⁴)) / x``: ``1/x`` far above the cutoff, 0 at and below 0."""
    positive = x.clamp(min=1e-14)
    return -torch.expm1(-((positive / cutoff) ** 4)) / positive


def _residual(krylov: Lanczos, y: Tensor) -> float:
    """Return ``|T y - e_1|``, the part of ``s`` that a damped solution leaves unanswered."""
    k = y.numel()
    rest = krylov.T[:k, :k] @ y
    rest[0] -= 1
    return float(torch.linalg.vector_norm(rest))
