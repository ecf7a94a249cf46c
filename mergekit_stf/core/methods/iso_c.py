"""Iso-C: the sum of all task matrices with one singular value, the mean of its own.

*No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, ICML 2025,
arXiv 2502.04959, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mergekit_stf.core.methods.method import LINEAR_ONLY_RULES, Merged, Method, combined, describe
from mergekit_stf.core.methods.options import CALIBRATE
from mergekit_stf.core.task_matrices import TaskMatrices


class IsoC(Method):
    """Isotropic merging in the common subspace.

    With ``Σ M_i = U diag(s) Vᵀ``, the merged matrix is ``M = mean(s) U Vᵀ`` (equation 6). The mean
    is over all ``min(m, n)`` singular values, zeros included, as in the authors' code. Directions
    of singular value zero have no basis of their own and are left out, where that code fills them
    with an arbitrary one; matrices of full rank show no difference. What is no linear map is
    averaged, as in the authors' code.
    """

    name = "iso_c"
    title = "Iso-C"
    reference = "Isotropic Model Merging, ICML 2025, arXiv 2502.04959, equation 6"
    url = "https://arxiv.org/abs/2502.04959"
    options = (CALIBRATE,)
    default_lambda = 1.0
    rules = LINEAR_ONLY_RULES

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class."""
        tasks = tasks.formed()
        (sum_,) = TaskMatrices.of([tasks.total()], tasks.source_dtype, tasks.name).features()
        flat = replace(sum_, s=torch.full_like(sum_.s, float(sum_.s.sum()) / min(tasks.shape)))
        M = combined(tasks, [flat], [flat.s])
        return Merged(M, describe(tasks, M), flat)
