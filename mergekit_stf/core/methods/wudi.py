"""WUDI in closed form: every task keeps its own response on the inputs that it has learned from.

*Whoever Started the Interference Should End It* (WUDI-Merging), ICML 2025, arXiv 2503.08099,
minimises ``Σ_i w_i |(M - M_i) M_iᵀ|²`` with ``w_i = 1/|M_i|²`` by 300 steps of Adam from the sum of
the task matrices: the rows of ``M_i`` stand for the inputs of its task. Here the minimum is taken
as it is, with a ridge towards a prior in place of the early stop. Without the ridge it is RegMean
with task matrices in place of data (ACTMat, arXiv 2604.01329).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import Merged, Method, describe
from mergekit_stf.core.methods.options import Option, number, one_of
from mergekit_stf.core.precision import length
from mergekit_stf.core.task_matrices import TaskMatrices

PRIORS = ("matched", "sum", "mean", "none")


def positive(value: object) -> float:
    """Return a number above 0."""
    if not (converted := number(value)) > 0:
        raise ValueError("must be a number above 0")
    return converted


def prior(value: object) -> str:
    """Return the name of a prior."""
    return one_of(value, PRIORS)


RIDGE = Option("ridge", 0.3, positive, "pull towards the prior, relative to the mean eigenvalue")
PRIOR = Option("prior", "matched", prior, "where no task has inputs")


class Wudi(Method):
    """WUDI's objective in closed form, with a ridge.

    With ``C_i = M_iᵀ M_i`` on the side of the inputs and ``w_i = 1/|M_i|²``,

        M = (Σ w_i M_i C_i + μ P) (Σ w_i C_i + μ I)⁻¹

    minimises ``Σ w_i |(M - M_i) M_iᵀ|² + μ |M - P|²`` (the paper's equation 10 and a ridge);
    ``μ`` is ``ridge`` times the mean eigenvalue of ``Σ w_i C_i``. The recipe's ``weight`` scales
    ``M_i`` before that: a task counts by its length in the answer, not in the weighting.

    The prior P decides along inputs that no task knows: ``sum`` is ``S = Σ M_i``, ``matched`` is
    ``S min(1, Σ|M_i|² / |S|²)``, the sum for orthogonal or contradicting tasks and the mean for
    equal ones, ``mean`` is ``S / T``, and ``none`` is 0.

    No eigenvalue of the system is below ``μ``, so that float32 is enough, and duplicates, negations
    and models of one lineage do no harm: what M loses against P is at most what it gains, hence
    ``|M - P|² <= Σ |P - M_i|² / μ``.
    """

    name = "wudi"
    title = "WUDI, closed form"
    reference = "WUDI-Merging, ICML 2025, arXiv 2503.08099, equation 10, with a ridge"
    url = "https://arxiv.org/abs/2503.08099"
    options = (RIDGE, PRIOR)
    default_lambda = 1.0
    sided = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class.

        Args:
            tasks: the task matrices.
            options: ``ridge`` and ``prior``.
        """
        solve = _in_factors if tasks.factored else _whole
        M = solve(tasks, float(options["ridge"]), str(options["prior"]))
        ridge = float(options["ridge"])
        return Merged(M, describe(tasks, M, ridge=ridge))


def prior_scale(kind: str, squares: float, total: float, count: int) -> float:
    """Return the factor of ``Σ M_i`` in a prior.

    Args:
        kind: the prior's name.
        squares: ``Σ |M_i|²``.
        total: ``|Σ M_i|²``.
        count: T, of the tasks that are not zero.
    """
    if kind == "matched":
        return min(1.0, squares / total) if total else 0.0
    return {"sum": 1.0, "mean": 1.0 / count, "none": 0.0}[kind]


def _whole(tasks: TaskMatrices, ridge: float, kind: str) -> Tensor | LowRank:
    m, n = tasks.shape if tasks.input_axis == 1 else tasks.shape[::-1]
    like = {"dtype": tasks.dtype, "device": tasks.device}
    A, B = torch.zeros(n, n, **like), torch.zeros(m, n, **like)  # type: ignore[call-overload]
    total, sizes = torch.zeros_like(B), []
    for M in tasks.matrices():
        if size := length(M):
            N = (M if tasks.input_axis == 1 else M.mT) / size
            C = N.mT @ N
            A += C
            B.addmm_(N, C, alpha=size) if m >= n else B.addmm_(N @ N.mT, N, alpha=size)
            total.add_(N, alpha=size)
            sizes.append(size)
    if not sizes:
        return tasks.total()
    mu = ridge * len(sizes) / n
    squares = sum(size * size for size in sizes)
    B.add_(total, alpha=mu * prior_scale(kind, squares, length(total) ** 2, len(sizes)))
    A.diagonal().add_(mu)
    M = torch.cholesky_solve(B.mT, torch.linalg.cholesky(A)).mT
    return M.contiguous() if tasks.input_axis == 1 else M.mT.contiguous()


def _in_factors(tasks: TaskMatrices, ridge: float, kind: str) -> Tensor | LowRank:
    """Stay in factors: with ``V`` of all tasks, ``Vᵀ(V D Vᵀ + μ)⁻¹ = (VᵀV D + μ)⁻¹ Vᵀ``."""
    found = [f if tasks.input_axis == 1 else f.transposed for f in tasks.features() if f.rank]
    if not found:
        return tasks.total()
    n = found[0].Vh.shape[1]
    mu, sizes = ridge * len(found) / n, [f.norm for f in found]
    U, Vh = torch.cat([f.U for f in found], dim=1), torch.cat([f.Vh for f in found])
    s = torch.cat([f.s for f in found])
    unit = torch.cat([f.s / size for f, size in zip(found, sizes, strict=True)])
    squares = float(s.square().sum())
    gram = (U.mT @ U) * (Vh @ Vh.mT)
    scale = prior_scale(kind, squares, float(s @ gram @ s), len(found))
    middle = Vh @ Vh.mT * unit.square()
    middle.diagonal().add_(mu)
    left = torch.linalg.solve(middle, U * (s * unit.square() + mu * scale * s), left=False)
    M = LowRank(left, Vh)
    return M if tasks.input_axis == 1 else M.transposed
