"""Localize-and-Stitch without data: the largest changes of each task, averaged where they meet.

*Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic*, TMLR 2025,
arXiv 2408.13656, the variant without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergekit_stf.core.methods.method import ALL_RULES, Merged, Method, describe
from mergekit_stf.core.task_matrices import TaskMatrices


class LocalizeAndStitch(Method):
    """Localize-and-Stitch, the variant that needs no data.

    Localize: each task keeps its largest entries, 5 % of them, which is the parameter ``density``
    with another default. Stitch: with ``m_i`` for 1 at the entries that task i keeps,
    ``M = Σ M_i / max(1, Σ m_i)``. There is no scale to tune.

    The paper selects over all layers at once; here each weight keeps its own share, as mergekit's
    own ``ties`` trims each tensor: a weight can then be merged without the others. An entry counts
    as kept where it is not 0. The paper leaves embeddings and heads as they are in the base; here
    they are merged as all other weights are, since language models are tuned as wholes
    (``rule: base`` with a filter leaves them).
    """

    name = "localize_stitch"
    title = "Localize-and-Stitch, dataless"
    reference = "Localize-and-Stitch, TMLR 2025, arXiv 2408.13656, dataless"
    url = "https://arxiv.org/abs/2408.13656"
    default_lambda = 1.0
    default_density = 0.05
    rules = ALL_RULES
    elementwise = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one weight; see the class."""
        matrices = list(tasks.matrices())
        kept = torch.zeros(tasks.shape, dtype=torch.int32, device=tasks.device)
        for M in matrices:
            kept += M != 0
        M = sum(matrices[1:], matrices[0]) / kept.clamp(min=1)
        return Merged(M, describe(TaskMatrices.of(matrices), M))
