"""KnOTS: task matrices are written in one basis of outputs, and merged there by TIES.

*Model Merging with SVD to Tie the KnOTS*, ICLR 2025, arXiv 2410.19735. TIES is
*Resolving Interference When Merging Models*, NeurIPS 2023, arXiv 2306.01708, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import LINEAR_ONLY_RULES, Merged, Method, describe
from mergekit_stf.core.methods.options import CALIBRATE, Option, fraction
from mergekit_stf.core.task_matrices import TaskMatrices
from mergekit_stf.core.tolerances import RANK
from mergekit_stf.core.trim import trim

ROUNDING = 1e-10
"""Coordinates below ``ROUNDING`` of their task's length are zeros, for TIES counts who has a sign:
the basis is exact to 1e-15, and to 1e-11 where a singular value is 1/100 of the largest."""

KEEP = Option("keep", 1.0, fraction, "fraction of each task's coordinates kept, the largest")


class KnOTS(Method):
    """KnOTS-TIES.

    The task matrices side by side are ``[M_1 ... M_T] = U diag(s) [V_1ᵀ ... V_Tᵀ]``: the columns of
    ``U`` are a basis of outputs that all share, and ``X_i = diag(s) V_iᵀ = Uᵀ M_i`` are the
    coordinates of task i in it. TIES keeps the ``keep`` largest of each ``X_i``, elects for each
    place the sign of their sum, and takes the mean of those that have this sign. The merged matrix
    is ``M = U X``.

    ``keep`` is ``topK`` of the authors' settings, and default and ``lambda`` are those of their
    Llama 3 8B (100 % and 0.5; their vision models have 20 %). The recipe's ``density`` trims the
    entries of ``M_i`` before, which is another thing. Ours differs in two points: coordinates are
    trimmed within each linear map, where the authors' code ranks those of the whole model together;
    and where signs cancel exactly nothing is elected, where it takes the sign of the whole model.

    The elected sign is not continuous in the inputs: where a sum is nearly 0, rounding decides.
    Features of equal singular values have no basis of their own, and the answer depends on the one
    that the decomposition picks. What is no linear map is averaged, as the authors merge the
    matrices of adapters alone.
    """

    name = "knots"
    title = "KnOTS-TIES"
    reference = "Model Merging with SVD to Tie the KnOTS, ICLR 2025, arXiv 2410.19735"
    url = "https://arxiv.org/abs/2410.19735"
    options = (KEEP, CALIBRATE)
    default_lambda = 0.5
    rules = LINEAR_ONLY_RULES
    sided = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class.

        Args:
            tasks: the task matrices.
            options: ``keep``.
        """
        outputs_first = tasks if tasks.input_axis else tasks.changed(_transpose, tasks.dtype)
        U = (_find_basis_of_factors if tasks.factored else _find_basis_of_wholes)(outputs_first)
        coordinates = [_find_coordinates(U, M) for M in outputs_first.read()]
        X = merge_by_ties([trim(C, options["keep"]) for C in coordinates])
        M = LowRank(U, X) if tasks.factored else (U @ X).to(tasks.dtype)
        M = M if tasks.input_axis else _transpose(M)
        return Merged(M, describe(tasks, M))


def merge_by_ties(matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean of the entries that have the sign of their sum, 0 where the sum is 0.

    Args:
        matrices: of one shape, at least one.
    """
    sign = torch.zeros_like(matrices[0])
    for M in matrices:
        sign += M
    sign.sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for M in matrices:
        agrees = M * sign > 0
        total += torch.where(agrees, M, 0.0)
        count += agrees
    return total / count.clamp_(min=1)


def _find_basis_of_wholes(tasks: TaskMatrices) -> Tensor:
    """Return the left singular vectors of ``[M_1 ... M_T]`` as eigenvectors of ``Σ M_i M_iᵀ``.

    In float64: in float32 the rounding of the basis alone would turn signs that TIES elects.
    """
    rows = tasks.shape[tasks.input_axis == 0]
    G = torch.zeros(rows, rows, dtype=torch.float64, device=tasks.device)
    for M in tasks.matrices():
        G.addmm_(M.double(), M.double().mT)
    values, Q = torch.linalg.eigh(G)
    U: Tensor = Q[:, values > RANK**2 * values[-1]]
    return U


def _find_basis_of_factors(tasks: TaskMatrices) -> Tensor:
    """Return the same from ``[M_1 ... M_T] = [L_1 ... L_T] diag(R_1, ..., R_T)``."""
    factors = [M for M in tasks.read() if isinstance(M, LowRank)]
    left = torch.cat([M.left.double() for M in factors], dim=1)
    right = torch.block_diag(*(M.right.double() for M in factors))  # type: ignore[no-untyped-call]
    return TaskMatrices.of([LowRank(left, right)]).features()[0].U


def _find_coordinates(U: Tensor, M: Tensor | LowRank) -> Tensor:
    """Return ``Uᵀ M``, (r, n), with zeros for what is rounding beside the length of M."""
    L, R = (M.left, M.right) if isinstance(M, LowRank) else (M, None)
    X = U.mT @ L.double()
    X = X if R is None else X @ R.double()
    return torch.nn.functional.hardshrink(X, ROUNDING * float(torch.linalg.vector_norm(X)))


def _transpose(M: Tensor | LowRank) -> Tensor | LowRank:
    return M.transposed if isinstance(M, LowRank) else M.mT.contiguous()
