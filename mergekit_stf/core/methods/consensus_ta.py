"""Consensus Task Arithmetic: the sum of all tasks where enough of them find themselves in it.

*Localizing Task Information for Improved Model Merging and Compression*, ICML 2024,
arXiv 2405.07813: TALL masks and Consensus Merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.methods.method import ALL_RULES, Merged, Method, describe
from mergekit_stf.core.methods.options import Option, not_negative, number
from mergekit_stf.core.task_matrices import TaskMatrices


def whole(value: object) -> int:
    """Return a whole number above 0."""
    if not (converted := number(value)).is_integer() or converted < 1:
        raise ValueError("must be a whole number above 0")
    return int(converted)


MASK = Option("mask", 0.4, not_negative, "how much nearer the sum must be to a task than the base")
AGREEING = Option("agreeing", 2, whole, "tasks that must keep an entry for it to stay")


class ConsensusTA(Method):
    """Consensus Task Arithmetic.

    With ``S = Σ M_i``, an entry belongs to task i where it moves it far from the base and near to
    the sum, ``|M_i| >= mask |S - M_i|`` (the TALL mask of the task; ``mask`` is the paper's λ_t).
    ``M`` is ``S`` at the entries that belong to at least ``agreeing`` tasks (the paper's k), and 0
    elsewhere: entries of one task alone, and of none, are left as they are in the base.

    The paper chooses λ_t for each task among 0.2 to 0.6, and the scale of M, on validation data.
    The default of ``mask`` is the middle of that range, that of ``lambda`` what the paper on TIES
    recommends for task arithmetic without such data, 0.4. With ``agreeing: 1`` and ``mask: 0`` the
    method is task arithmetic. Nothing in it is of the whole model.
    """

    name = "consensus_ta"
    title = "Consensus TA"
    reference = "Localizing Task Information, ICML 2024, arXiv 2405.07813, Consensus Merging"
    url = "https://arxiv.org/abs/2405.07813"
    options = (MASK, AGREEING)
    default_lambda = 0.4
    rules = ALL_RULES
    elementwise = True

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one weight; see the class.

        Args:
            tasks: the task matrices.
            options: ``mask`` and ``agreeing``.

        Raises:
            STFError: more tasks must agree than there are.
        """
        if options["agreeing"] > tasks.count:
            raise STFError(
                f"{tasks.name}: `agreeing: {options['agreeing']}` asks for more models than the "
                f"{tasks.count} that are merged, so that nothing would be left; lower it"
            )
        matrices = list(tasks.matrices())
        total = sum(matrices[1:], matrices[0])
        votes = torch.zeros(tasks.shape, dtype=torch.int32, device=tasks.device)
        for M in matrices:
            votes += M.abs() >= options["mask"] * (total - M).abs()
        M = torch.where(votes >= options["agreeing"], total, 0.0)
        return Merged(M, describe(TaskMatrices.of(matrices), M))
