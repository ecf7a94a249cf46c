"""PCB-Merging: each entry of each task counts by how it competes with all others.

*Parameter Competition Balancing for Model Merging*, NeurIPS 2024, arXiv 2410.02396, section 3, as
the authors' ``pcb-merging.py`` computes it, which is where the published figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.methods.method import ALL_RULES, Merged, Method, describe
from mergekit_stf.core.methods.options import Option, fraction
from mergekit_stf.core.task_matrices import TaskMatrices
from mergekit_stf.core.trim import kth_largest

RATIO = Option("ratio", 0.1, fraction, "share of each task's entries that compete, by score")

OUTLIERS = 1e-4
"""Share of a task's entries, at either end of their magnitudes, that are brought to the next one;
the authors' value."""


class PCB(Method):
    """Merging by parameter competition balancing.

    With the entries of ``M_i`` clipped to the magnitudes between their outer ``OUTLIERS``, and
    ``N`` for bringing a vector's entries to [0, 1] by its least and its largest,

        score_i = exp(T N(|M_i|)²) tanh(M_i Σ_j M_j)    intra- times inter-balancing
        β_i = N(score_i with all below its leading ``ratio`` raised to their threshold)
        M = Σ_i β_i M_i / Σ_i β_i                       drop and rescale, 0 where every β_i is 0

    The paper writes softmax for the exponential, whose denominator ``N`` cancels, and a sum of
    softmaxes for the hyperbolic tangent. Where all scores of a task are equal, as those of a weight
    of one entry, ``N`` has nothing to go by, and β is 1 where the score is above 0.

    The paper takes shares and ``N`` over the whole flattened model. Here they are of each weight,
    as mergekit's own ``ties`` trims each tensor: a weight can then be merged without the others,
    and no kind of weight is dropped because another one has larger entries. What is clipped is
    rounded down, nothing in weights of less than 10,000 entries.
    """

    name = "pcb"
    title = "PCB-Merging"
    reference = "Parameter Competition Balancing, NeurIPS 2024, arXiv 2410.02396, section 3"
    url = "https://arxiv.org/abs/2410.02396"
    options = (RATIO,)
    default_lambda = 1.0
    rules = ALL_RULES
    elementwise = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one weight; see the class.

        Args:
            tasks: the task matrices.
            options: ``ratio``.
        """
        matrices = list(tasks.matrices())
        total = sum(matrices[1:], matrices[0])
        weighted, weights = torch.zeros_like(total), torch.zeros_like(total)
        for M in matrices:
            clipped = clip_outliers(M)
            beta = keep_leading(compute_scores(M, clipped, total, tasks.count), options["ratio"])
            weighted.addcmul_(clipped, beta)
            weights += beta
        M = torch.where(weights > 0, weighted / weights, 0.0)
        return Merged(M, describe(TaskMatrices.of(matrices), M))


def compute_scores(M: Tensor, clipped: Tensor, total: Tensor, count: int) -> Tensor:
    """Return how each entry of a task competes, up to a factor, which ``N`` cancels.

    Args:
        M: the task matrix.
        clipped: what ``clip_outliers`` makes of it.
        total: the sum of all.
        count: T, of all tasks.
    """
    size = normalise(clipped.abs())
    # The factor is exp(-T), which keeps many tasks from overflowing.
    return torch.exp(count * (size.square() - 1)) * torch.tanh(M * total)


def keep_leading(scores: Tensor, ratio: float) -> Tensor:
    """Return the coefficients ``β`` of one task's entries, in [0, 1].

    Args:
        scores: of the entries.
        ratio: share of the entries that are not below the threshold.
    """
    rank = max(1, scores.numel() - int(scores.numel() * (1 - ratio)))
    threshold, _ = kth_largest(scores.reshape(-1), rank)
    beta = normalise(scores.clamp(min=threshold))
    return beta if threshold < scores.max() else beta * (scores == threshold) * (threshold > 0)


def clip_outliers(M: Tensor) -> Tensor:
    """Return ``M`` with its outlying magnitudes brought to the next ones; signs and zeros stay."""
    outliers = int(OUTLIERS * M.numel())
    if not outliers:
        return M
    magnitude = M.abs().reshape(-1)
    largest, _ = kth_largest(magnitude, outliers + 1)
    least, _ = kth_largest(magnitude, magnitude.numel() - outliers)
    return M.sign() * M.abs().clamp(least, largest)


def normalise(x: Tensor) -> Tensor:
    """Return ``(x - min) / (max - min)``, 1 everywhere where all entries are equal."""
    low, high = torch.aminmax(x)
    return (x - low) / (high - low) if high > low else torch.ones_like(x)
