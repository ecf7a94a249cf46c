"""Iso-CTS: common and task-specific directions, made orthogonal, with one singular value for all.

*No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, ICML 2025,
arXiv 2502.04959, section 4 and algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import LINEAR_ONLY_RULES, Merged, Method, describe
from mergekit_stf.core.methods.options import CALIBRATE, Option, number
from mergekit_stf.core.methods.tsv_m import find_triples, orthogonalise
from mergekit_stf.core.task_matrices import TaskMatrices

LEFT = 1e-6
"""What a projection leaves of a task matrix is rounding below ``LEFT`` of its length: of a float32
matrix of low rank it is 1e-7 (measured)."""

SINGULAR = 1e-10
"""As that of ``tsv_m``, for vectors in float64: as many vectors as there are directions are seldom
far from each other's span, 1e-7 at n = 4096."""

ROUTE = "gram_float64"
"""Of the decompositions. The weakest directions count as much as the strongest; float32 would miss
them by 4e-5."""


def share(value: object) -> float:
    """Return a share of directions, from 0 to 1."""
    if not 0 <= (converted := number(value)) <= 1:
        raise ValueError("must be a number from 0 to 1")
    return converted


COMMON = Option("common", 0.8, share, "share of directions that are taken from the sum")


class IsoCTS(Method):
    """Isotropic merging in common and task-specific subspaces.

    Of the ``r = min(m, n)`` directions, the common ones are the ``k`` leading features of
    ``Σ M_i``. Each task adds the ``t`` leading features of ``M_i - U_c U_cᵀ M_i``, what the common
    output directions ``U_c`` leave of it, with ``T t = r - k``: ``t`` is ``(1 - common) r / T``
    rounded, and at most ``r / T``. ``U`` and ``V`` of all are replaced by the nearest matrices of
    orthonormal columns, and every singular value by their mean: ``M = mean(s) U_⊥ V_⊥ᵀ``. With
    ``t = 0`` this is Iso-C.

    The mean is over all r directions, zeros included, as in the authors' code. Directions of
    singular value zero, and those in the span of others, have no basis of their own and are left
    out, where that code takes an arbitrary one. Adapters whose ranks add up to no more than k
    leave nothing beside the common directions, and the answer is that of Iso-C. What is no linear
    map is averaged, as in the authors' code.
    """

    name = "iso_cts"
    title = "Iso-CTS"
    reference = "Isotropic Model Merging, ICML 2025, arXiv 2502.04959, algorithm 2"
    url = "https://arxiv.org/abs/2502.04959"
    options = (COMMON, CALIBRATE)
    default_lambda = 1.0
    rules = LINEAR_ONLY_RULES

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class.

        Args:
            tasks: the task matrices.
            options: ``common``.
        """
        side, total = min(tasks.shape), tasks.total()
        own = min(round((side - int(side * options["common"])) / tasks.count), side // tasks.count)
        (sum_,) = TaskMatrices.of([_to_float64(total)], name=tasks.name).features(route=ROUTE)
        found = [sum_.leading(side - own * tasks.count)]
        if own:
            rest = tasks.changed(partial(remove, found[0].U), torch.float64)
            for f, size in zip(rest.features(route=ROUTE), tasks.norms(), strict=True):
                found.append(f.leading(min(own, int(torch.count_nonzero(f.s > LEFT * size)))))
        s = torch.cat([f.s for f in found])
        if not s.numel():
            return Merged(total, describe(tasks, total))
        U = orthogonalise(torch.cat([f.U for f in found], dim=1), SINGULAR)
        V = orthogonalise(torch.cat([f.Vh for f in found]).mT, SINGULAR)
        flat = float(s.sum()) / side
        M = LowRank(flat * U, V.mT) if tasks.factored else (flat * U @ V.mT).to(tasks.dtype)
        return Merged(M, describe(tasks, M), find_triples(U, torch.full_like(s, flat), V))


def remove(U: Tensor, M: Tensor | LowRank) -> Tensor | LowRank:
    """Return ``M - U Uᵀ M`` in float64, in factors where M is.

    Args:
        U: (m, k), orthonormal columns, float64.
        M: (m, n).
    """
    X = _to_float64(M)
    if isinstance(X, LowRank):
        return LowRank(X.left - U @ (U.mT @ X.left), X.right)
    return X - U @ (U.mT @ X)


def _to_float64(M: Tensor | LowRank) -> Tensor | LowRank:
    """Return M in float64."""
    return LowRank(M.left.double(), M.right.double()) if isinstance(M, LowRank) else M.double()
