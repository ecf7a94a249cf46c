"""TSV-M: the leading singular features of every task, made orthogonal to each other.

*Task Singular Vectors: Reducing Task Interference in Model Merging*, CVPR 2025, arXiv 2412.00081,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import LINEAR_ONLY_RULES, Merged, Method, describe
from mergekit_stf.core.methods.options import CALIBRATE
from mergekit_stf.core.pool import map_matrices, workers_for
from mergekit_stf.core.task_matrices import TaskMatrices

SINGULAR = 1e-6
"""Eigenvalues of a Gram matrix of unit vectors below this, relative to the largest, are zeros: of
features that are in the span of others, as those of equal tasks are."""


class TSVM(Method):
    """Merging by task singular vectors.

    Each task keeps its ``k = floor(min(m, n) / T)`` leading features, at least one. With ``U`` and
    ``V`` of all tasks stacked, the merged matrix is ``M = U_⊥ diag(s) V_⊥ᵀ``, where ``U_⊥`` and
    ``V_⊥`` are the nearest matrices of orthonormal columns (equation 9, the orthogonal Procrustes
    problem): ``U_⊥ = U (UᵀU)^(-1/2)``. Features in the span of others have no direction of their
    own; the inverse is then the pseudo-inverse, where the authors' code picks an arbitrary one.
    What is no linear map is averaged, as in the authors' code.
    """

    name = "tsv_m"
    title = "TSV-M"
    reference = "Task Singular Vectors, CVPR 2025, arXiv 2412.00081, algorithm 1"
    url = "https://arxiv.org/abs/2412.00081"
    options = (CALIBRATE,)
    default_lambda = 1.0
    rules = LINEAR_ONLY_RULES

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class."""
        count = max(1, min(tasks.shape) // tasks.count)
        features = [f.leading(count) for f in tasks.features()]
        present = [f for f in features if f.rank]
        if not present:
            M = tasks.total()
            return Merged(M, describe(tasks, M))
        stacked = [torch.cat([f.U for f in present], dim=1), torch.cat([f.Vh for f in present]).mT]
        workers = workers_for(stacked[0].shape[1], len(stacked), tasks.device)
        U, V = map_matrices(orthogonalise, stacked, workers, tasks.device)
        s = torch.cat([f.s for f in present])
        M = LowRank(U * s, V.mT) if tasks.factored else (U * s) @ V.mT
        return Merged(M, describe(tasks, M, features), find_triples(U, s, V))


def orthogonalise(X: Tensor, singular: float = SINGULAR) -> Tensor:
    """Return ``X (XᵀX)^(-1/2)``, the nearest matrix of orthonormal columns where X has full rank.

    Args:
        X: (m, r), unit vectors as columns.
        singular: eigenvalues of ``XᵀX`` below this, relative to the largest, are zeros.
    """
    values, Q = torch.linalg.eigh(X.mT.double() @ X.double())
    kept = values > singular * values[-1]
    root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    turned: Tensor = (Q * root) @ Q.mT
    return X @ turned.to(X.dtype)


def find_triples(U: Tensor, s: Tensor, V: Tensor) -> Features | None:
    """Return the singular triples of ``U diag(s) Vᵀ``, unless columns have lost their direction.

    Args:
        U: (m, r), from ``orthogonalise``.
        s: (r,).
        V: (n, r), from ``orthogonalise``.
    """
    whole = all(round(float(X.square().sum())) == s.numel() for X in (U, V))
    return Features(U, s, V.mT, "orthogonalised") if whole else None
