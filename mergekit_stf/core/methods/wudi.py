"""WUDI in closed form: every task keeps its own response on the inputs that it has learned from.

*Whoever Started the Interference Should End It* (WUDI-Merging), ICML 2025, arXiv 2503.08099,
minimises ``Σ_i w_i |(M - M_i) M_iᵀ|²`` with ``w_i = 1/|M_i|²`` by 300 steps of Adam from the sum of
the task matrices: the rows of ``M_i`` stand for the inputs of its task. Here the minimum is taken
as it is, with a ridge towards a prior in place of the early stop. Its options lead to its
relatives, ACTMat, TACT and SWUDI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features.features import kept_rank
from mergekit_stf.core.features.routes import lower_gram
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import Merged, Method, describe
from mergekit_stf.core.methods.options import (
    CALIBRATE,
    Option,
    fraction,
    not_negative,
    number,
    one_of,
    rank,
)
from mergekit_stf.core.precision import length
from mergekit_stf.core.task_matrices import TaskMatrices
from mergekit_stf.core.tolerances import RANK
from mergekit_stf.core.trim import trim

PRIORS = ("matched", "sum", "mean", "none")
WEIGHTINGS = ("unit", "equal")


def prior(value: object) -> str:
    """Return the name of a prior."""
    return one_of(value, PRIORS)


def weighting(value: object) -> str:
    """Return the name of a weighting."""
    return one_of(value, WEIGHTINGS)


def flow(value: object) -> float | str:
    """Return the time of gradient flow, or ``none``."""
    if value == "none":
        return "none"
    if not (converted := number(value)) > 0:
        raise ValueError("must be `none` or a number above 0")
    return converted


RIDGE = Option(
    "ridge", 0.3, not_negative, "pull towards the prior, relative to the mean eigenvalue"
)
PRIOR = Option("prior", "matched", prior, "what is merged along inputs that no model learned from")
WEIGHTING = Option("weighting", "unit", weighting, "whether tasks are heard whatever their length")
INPUTS = Option("inputs", 1.0, fraction, "fraction of entries that stand for a task's inputs")
FLOW = Option("flow", "none", flow, "time of gradient flow from the prior, for an early stop")
LEADING = Option("leading", 1.0, rank, "input directions corrected: a fraction, or a count above 1")


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

    Its relatives are the same with ``C = Σ w_i C_i``, ``D = Σ w_i M_i C_i`` and another function f
    of the eigenvalues of C in ``M = P + (D - P C) f(C)``; the ridge's is ``1 / (λ + μ)``:

    * ACTMat (arXiv 2604.01329) has ``w_i = 1``, ``P = 0`` and the pseudo-inverse ``1 / λ``:
      ``weighting: equal, ridge: 0``. The system may be singular: along inputs that no task knows,
      M keeps the prior, which is 0 there, a sum of tasks, so that the answer is the one of least
      norm whatever the prior. Eigenvalues below 1e-12 of the largest, which are features below
      1e-6, count as zeros; the authors' cut grows with n, to 1e-4 for n = 1000.
    * TACT, of the same authors, takes the C_i of the task matrices' largest entries, half of them:
      the same with ``inputs: 0.5, prior: none``. Entries are counted as ``density`` counts them;
      the authors' code rounds.
    * SWUDI (arXiv 2606.07289) has ``P = S`` and ``(1 - exp(-t λ)) / λ`` on the leading K
      eigenvectors, 0 elsewhere: gradient flow that is stopped at t. ``prior: sum, ridge: 0, flow:
      t, leading: K``. With a ridge, the flow is that of the objective with the ridge. Time is in
      units in which the eigenvalues of C add up to T, as they do for ``w_i = 1/|M_i|²``.
    """

    name = "wudi"
    title = "WUDI, closed form"
    reference = "WUDI-Merging, ICML 2025, arXiv 2503.08099, equation 10, with a ridge"
    url = "https://arxiv.org/abs/2503.08099"
    options = (RIDGE, PRIOR, WEIGHTING, INPUTS, FLOW, LEADING, CALIBRATE)
    default_lambda = 1.0
    sided = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class.

        Args:
            tasks: the task matrices.
            options: a value for each of ``options``.

        Raises:
            STFError: ``inputs`` is below 1 for adapters, whose entries are not formed.
        """
        if tasks.factored and options["inputs"] < 1:
            raise STFError(
                f"{tasks.name or 'a weight'}: `inputs` keeps the largest entries of whole matrices,"
                " and adapters are merged from their factors; leave it at 1"
            )
        tasks = tasks.formed()  # the record's cosines need all together in any case
        M = (_in_factors if tasks.factored else _whole)(tasks, options)
        return Merged(M, describe(tasks, M, ridge=float(options["ridge"])))


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


def _whole(tasks: TaskMatrices, options: Mapping[str, Any]) -> Tensor | LowRank:
    m, n = tasks.shape if tasks.input_axis == 1 else tasks.shape[::-1]
    dtype = tasks.dtype if options["ridge"] else torch.float64
    A = torch.zeros(n, n, dtype=dtype, device=tasks.device)
    B = torch.zeros(m, n, dtype=dtype, device=tasks.device)
    total, sizes = torch.zeros_like(B), []
    for M in tasks.matrices():
        if size := length(M):
            sizes.append(size)
            w = 1.0 if options["weighting"] == "unit" else (size / sizes[0]) ** 2
            N = (M if tasks.input_axis == 1 else M.mT).to(dtype) / size
            K = trim(N, options["inputs"])
            C = lower_gram(K, dtype)
            A.add_(C, alpha=w)
            left, right = (N, mirror(C)) if m >= n else (N @ K.mT, K)
            B.addmm_(left, right, alpha=w * size)
            total.add_(N, alpha=size)
    if not sizes:
        return tasks.total()
    squares = sum(size * size for size in sizes)
    total.mul_(prior_scale(options["prior"], squares, length(total) ** 2, len(sizes)))
    M = _solution(mirror(A), B, total, len(sizes), n, options).to(tasks.dtype)
    return M.contiguous() if tasks.input_axis == 1 else M.mT.contiguous()


def mirror(lower: Tensor) -> Tensor:
    """Fill in the upper triangle of a symmetric matrix of which the lower one is known."""
    return lower.tril_().add_(lower.tril(-1).mT)


def _in_factors(tasks: TaskMatrices, options: Mapping[str, Any]) -> Tensor | LowRank:
    """Stay in factors: with ``V`` of all tasks and ``V = Q R``, the system is one of ``Qᵀ``."""
    found = [f if tasks.input_axis == 1 else f.transposed for f in tasks.features() if f.rank]
    if not found:
        return tasks.total()
    U, V = torch.cat([f.U for f in found], dim=1), torch.cat([f.Vh for f in found]).mT
    Q, R = torch.linalg.qr(V)
    s = torch.cat([f.s for f in found])
    equal = options["weighting"] == "equal"
    unit = torch.cat([f.s / (found[0].norm if equal else f.norm) for f in found]).square()
    total = float(s @ ((U.mT @ U) * (R.mT @ R)) @ s)
    scale = prior_scale(options["prior"], float(s.square().sum()), total, len(found))
    P = scale * s.unsqueeze(1) * R.mT
    B = (s * unit).unsqueeze(1) * R.mT
    X = _solution((R * unit) @ R.mT, B, P, len(found), V.shape[0], options)
    M = LowRank(U @ X, Q.mT)
    return M if tasks.input_axis == 1 else M.transposed


def _solution(
    A: Tensor, B: Tensor, P: Tensor, count: int, n: int, options: Mapping[str, Any]
) -> Tensor:
    """Return ``P + (B - P A) f(A)``; see the class for f.

    Args:
        A: (k, k), ``Σ w_i C_i`` in a basis of the inputs that tasks know; overwritten.
        B: (m, k), ``Σ w_i M_i C_i``; overwritten.
        P: (m, k), the prior.
        count: T.
        n: of the inputs, k or more.
        options: of the method.
    """
    trace = float(A.diagonal().sum())
    mu, leading = options["ridge"] * trace / n, kept_rank((n, n), options["leading"])
    if mu and options["flow"] == "none" and leading == n:
        B.add_(P, alpha=mu)
        A.diagonal().add_(mu)
        solved: Tensor = torch.cholesky_solve(B.mT, torch.linalg.cholesky(A)).mT
        return solved
    values, Q = torch.linalg.eigh(A.double())
    f = 1 / (values + mu)
    if options["flow"] != "none":
        f *= -torch.expm1(-options["flow"] * count / trace * (values + mu))
    kept = values > RANK**2 * values[-1]
    kept[:-leading] = False
    filtered: Tensor = (Q * torch.where(kept, f, 0.0)) @ Q.mT
    return P + (B - P @ A) @ filtered.to(P.dtype)
