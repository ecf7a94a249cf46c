"""MetaGPT: task arithmetic with a scale for each model, the share of its squared length.

*MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic*, EMNLP 2024,
arXiv 2406.11385, the closed form of the scaling coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.low_rank import LowRank, sum_of
from mergekit_stf.core.methods.method import ALL_RULES, Merged, Method, describe
from mergekit_stf.core.task_matrices import TaskMatrices


class MetaGPT(Method):
    """Model-exclusive task arithmetic.

    ``M = Σ λ_i M_i`` with ``λ_i = |θ_i - θ_0|² / Σ_j |θ_j - θ_0|²``: where task vectors are
    orthogonal and models linear near the base, these minimise a bound of the mean loss that the
    merge costs each task. They add up to 1.

    The lengths are of the whole models, as in the paper, and of the checkpoints as they are:
    ``weight`` and ``density`` change ``M_i`` and leave ``λ_i``.
    """

    name = "metagpt"
    title = "MetaGPT"
    reference = "MetaGPT, EMNLP 2024, arXiv 2406.11385, closed form of the scaling coefficients"
    url = "https://arxiv.org/abs/2406.11385"
    default_lambda = 1.0
    rules = ALL_RULES
    elementwise = True
    whole_models = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one weight; see the class.

        Raises:
            STFError: the lengths of the whole models are not known.
        """
        if len(tasks.squared_distances) != tasks.count:
            raise STFError(f"{tasks.name}: metagpt needs the lengths of the whole models")
        total = sum(tasks.squared_distances) or 1.0
        shares = [square / total for square in tasks.squared_distances]
        M = sum_weighted(tasks, shares)
        return Merged(M, describe(tasks, M, facts={"largest_share": max(shares)}))


def sum_weighted(tasks: TaskMatrices, shares: list[float]) -> Tensor | LowRank:
    """Return ``Σ shares_i M_i``, in factors where all task matrices are."""
    if tasks.factored:
        low = (M for M in tasks.read() if isinstance(M, LowRank))
        return sum_of([M.times(share) for M, share in zip(low, shares, strict=True)])
    total = torch.zeros(tasks.shape, dtype=tasks.dtype, device=tasks.device)
    for M, share in zip(tasks.matrices(), shares, strict=True):
        total.add_(M, alpha=share)
    return total
