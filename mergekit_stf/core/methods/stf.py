"""STF, Superpose Task-specific Features: every singular feature keeps its own response.

*Superpose Task-specific Features for Model Merging*, EMNLP 2025, arXiv 2502.10698, Algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.method import Merged, Method, combined, describe
from mergekit_stf.core.methods.options import CALIBRATE, RANK, Option, ridge_or_auto
from mergekit_stf.core.precision import full_precision
from mergekit_stf.core.record import Record
from mergekit_stf.core.solve import Solution, choose_gram, solve
from mergekit_stf.core.task_matrices import TaskMatrices

RIDGE = Option(
    "ridge", "auto", ridge_or_auto, "regularisation of the solve, relative to G's unit diagonal"
)


class SuperposeFeatures(Method):
    """Superpose Task-specific Features.

    ``M`` is the matrix of smallest Frobenius norm with ``u_kᵀ M v_k = s_k`` for every singular
    triple of every task matrix: with ``G = (UᵀU) ∘ (VᵀV)`` of all stacked triples, it is
    ``M = Σ_k alpha_k u_k v_kᵀ`` for ``G alpha = s`` (equations 2 and 3, Theorem 1).
    """

    name = "stf"
    title = "STF"
    reference = "Superpose Task-specific Features, EMNLP 2025, arXiv 2502.10698, Algorithm 1"
    url = "https://arxiv.org/abs/2502.10698"
    options = (RANK, RIDGE, CALIBRATE)
    default_lambda = 0.8
    own_rule = "superpose"

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map; see the class.

        Args:
            tasks: the task matrices.
            options: ``rank``, the leading features kept; ``ridge``, added to the unit diagonal of
                G, where ``auto`` is 0 and damps what contradicts itself in ill-posed systems;
                ``route``, of the decomposition, is optional.
        """
        features = tasks.features(options["rank"], options.get("route", "auto"))
        present = [f for f in features if f.rank]
        if not present:
            M = combined(tasks, features, [f.s for f in features])
            cosines = torch.zeros(tasks.count, tasks.count, dtype=torch.float64)
            return Merged(M, describe(tasks, M, features, cosines))
        ridge = None if options["ridge"] == "auto" else float(options["ridge"])
        G = choose_gram(present)
        solution = solve(present, ridge, G)
        cosines = _spread_cosines(G.cosines(), features)
        del G
        if not solution.converged:
            _warn(tasks.name, solution)
        alpha = torch.split(solution.alpha, [f.rank for f in present])
        M = combined(tasks, present, alpha)
        record = describe(tasks, M, features, cosines, **_facts(present, solution))
        return Merged(M, record)


def superpose(
    matrices: Iterable[Tensor | LowRank],
    *,
    rank: float = 1.0,
    ridge: float | None = None,
    route: str = "auto",
    source_dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Merged:
    """Merge task matrices by :class:`SuperposeFeatures`, where they are all at hand.

    Args:
        matrices: the task matrices, each (m, n), float32 or float64 on one device, or in factors.
        rank: see the class.
        ridge: see the class; ``None`` is ``auto``.
        route: of the decomposition, ``auto`` or a key of ``features.decompose.ROUTES``.
        source_dtype: type of the checkpoints; bfloat16 allows a quicker decomposition.
        name: of the weight, for warnings and errors.

    Raises:
        ValueError: there is no matrix, or their shapes differ.
        STFError: no driver decomposes one of them.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([2.0, 0.0]))
        >>> B = torch.diag(torch.tensor([0.0, 3.0]))
        >>> superpose([A, B]).M
        tensor([[2., 0.],
                [0., 3.]])
    """
    tasks = TaskMatrices.of(list(matrices), source_dtype, name)
    options = {"rank": rank, "ridge": "auto" if ridge is None else ridge, "route": route}
    with full_precision(), torch.no_grad():
        return SuperposeFeatures().merge(tasks, options)


def _spread_cosines(cosines: Tensor, features: Sequence[Features]) -> Tensor:
    """Spread the cosines of the tasks with features over all tasks, with zeros for the others."""
    present = torch.tensor([f.rank > 0 for f in features])
    spread = torch.zeros(len(features), len(features), dtype=torch.float64)
    spread[torch.outer(present, present)] = cosines.reshape(-1)
    return spread


def _facts(features: Sequence[Features], solution: Solution) -> dict[str, Any]:
    """Return the record's fields on the solve."""
    ratio = (solution.alpha / torch.cat([f.s for f in features])).sort().values
    quartiles = [step * (ratio.numel() - 1) // 4 for step in range(5)]
    names = Record.__dataclass_fields__.keys() & Solution.__dataclass_fields__.keys()
    return {name: getattr(solution, name) for name in names} | {
        "alpha_ratio": tuple(ratio[quartiles].tolist())
    }


def _warn(name: str, solution: Solution) -> None:
    warnings.warn(
        f"{name or 'a weight'}: the solve stopped at a relative residual of "
        f"{solution.residual:.1e} after {solution.iterations} steps; "
        "set `ridge: 0.01` for this weight, or `rank: 0.5`",
        RuntimeWarning,
        stacklevel=4,
    )
