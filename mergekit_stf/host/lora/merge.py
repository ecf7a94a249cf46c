"""Merge what several adapters do to one weight, in factors wherever the recipe allows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.lowrank import FactoredSuperposition, LowRank, sum_of, superpose_factors
from mergekit_stf.core.lowrank_report import report_of
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.diagnostics.notices import NEAR_DUPLICATE
from mergekit_stf.host.lora.plan import AdapterPlan, TouchedWeight
from mergekit_stf.host.lora.tasks import AdapterTask, Delta, tasks_of
from mergekit_stf.host.merging.finite import copied, is_finite, rounded
from mergekit_stf.host.merging.split import parse as parse_split
from mergekit_stf.host.merging.tasks import check_type
from mergekit_stf.host.planning.planned import PlannedWeight


class AdapterMerger:
    """Merges weight by weight, and remembers which systems were ill-posed.

    Args:
        plan: what the adapters change.

    Attributes:
        damped: for each weight whose system was damped, the pairs of near-duplicate adapters.
        infinite: the weights that were copied from the base with infinite entries.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        self.plan = plan
        self.damped: dict[str, list[tuple[str, str]]] = {}
        self.infinite: list[str] = []

    def delta(self, stored: str, base: Callable[[], Tensor]) -> Delta | None:
        """Return what is added to a weight, with lambda in it; None where nothing is.

        A low-rank update without trimming stays in its factors. Trimming needs the whole matrix,
        and so does a weight that an adapter stores as a whole.

        Args:
            stored: the weight's name in the base's checkpoint.
            base: reads its tensor; called only where the difference to it is needed.

        Raises:
            STFError: a stack of experts, or a split that does not fit.
        """
        weight = self.plan.touched.get(stored)
        if weight is None or weight.planned.rule == "base":
            return None
        start = time.perf_counter()
        delta, parts = self._merged(weight, base)
        self._record(weight.planned, parts, time.perf_counter() - start)
        return delta

    def pieces(
        self, stored: str, delta: Delta | None, base: Tensor, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield a weight of the merged model, in blocks of rows, each valid until the next.

        It is formed in float32 or better and rounded once.

        Args:
            stored: the weight's name in the base's checkpoint.
            delta: what is added to it.
            base: its tensor.
            dtype: the type of the result.

        Raises:
            STFError: the base holds NaN or infinity, or a type that holds no merged weight, or an
                entry of the result is too large for its type.
        """
        if delta is None:
            tensor = copied(stored, base, dtype, self.plan.base)
            if not is_finite(tensor):
                self.infinite.append(stored)
            yield tensor
            return
        check_type(stored, base.dtype)
        for block in _added(delta, base):
            yield rounded(stored, block, dtype, [("base_model", base)])

    def _merged(
        self, weight: TouchedWeight, base: Callable[[], Tensor]
    ) -> tuple[Delta, list[FactoredSuperposition]]:
        planned, tasks = weight.planned, tasks_of(weight, base)
        if planned.rule == "mean":
            return _sum([task.trimmed for task in tasks], 1 / len(planned.models)), []
        scale = float(planned.shared["lambda"])
        if planned.rule == "sum":
            return _sum([task.trimmed for task in tasks], scale), []
        parts = [*self._superposed(tasks, planned)]
        return sum_of([M for M, _ in parts]).scaled(scale), [part for _, part in parts]

    def _superposed(
        self, tasks: Sequence[AdapterTask], planned: PlannedWeight
    ) -> Iterator[tuple[LowRank, FactoredSuperposition]]:
        """Yield the merged matrix, or each map of a fused projection in its place."""
        shape = planned.header.shape
        if len(shape) != 2:
            raise STFError(
                f"{planned.name}: an adapter replaces a stack of shape {shape}, and "
                "only matrices are superposed here; set rule: sum for it, or merge full models"
            )
        split = parse_split(planned.shared["split"])
        if split is None:
            part = self._superpose(tasks, planned)
            yield part.M, part
            return
        try:
            places = list(split.indices(shape))
        except ValueError as error:
            raise STFError(f"{planned.name}: {error}") from error
        for place in places:
            part = self._superpose([task.part(place) for task in tasks], planned)
            yield part.M.placed(place, shape), part

    def _superpose(
        self, tasks: Sequence[AdapterTask], planned: PlannedWeight
    ) -> FactoredSuperposition:
        ridge = planned.shared["ridge"]
        deltas = [task.trimmed for task in tasks]
        found = superpose_factors(
            deltas,
            rank=planned.shared["rank"],
            ridge=None if ridge == "auto" else float(ridge),
            name=planned.name,
        )
        if found.solution is not None and found.solution.cutoff:
            sources = [task.source for task in tasks]
            self.damped.setdefault(planned.name, []).extend(_near_duplicates(sources, deltas))
        return found

    def _record(
        self, planned: PlannedWeight, parts: Sequence[FactoredSuperposition], seconds: float
    ) -> None:
        recorder = diagnostics.active()
        if recorder is not None:
            recorder.record(
                name=planned.name,
                rule=planned.rule,
                shape=planned.header.shape,
                models=[adapter.source for adapter in self.plan.adapters],
                seconds=seconds,
                device=torch.device("cpu"),
                reports=[report_of(part) for part in parts],
            )


def _added(delta: Delta, base: Tensor) -> Iterator[Tensor]:
    if isinstance(delta, LowRank):
        yield from delta.added_to(base)
    else:
        compute = torch.promote_types(base.dtype, delta.dtype)
        yield base.to(compute) + delta.to(compute)


def _sum(tasks: list[Delta], scale: float) -> Delta:
    factored = [task for task in tasks if isinstance(task, LowRank)]
    if len(factored) == len(tasks):
        return sum_of(factored).scaled(scale)
    whole = [task.dense() if isinstance(task, LowRank) else task for task in tasks]
    return torch.stack([task.double() for task in whole]).sum(dim=0) * scale


def _near_duplicates(sources: Sequence[str], deltas: Sequence[Delta]) -> list[tuple[str, str]]:
    """Return the pairs of adapters whose updates point the same or the opposite way."""
    factors = [_as_factors(delta) for delta in deltas]
    return [
        (sources[i], sources[j])
        for i, j in combinations(range(len(factors)), 2)
        if abs(factors[i].inner(factors[j]))
        >= NEAR_DUPLICATE * max(factors[i].norm * factors[j].norm, 1e-300)
    ]


def _as_factors(delta: Delta) -> LowRank:
    if isinstance(delta, LowRank):
        return delta
    return LowRank(delta.double(), torch.eye(delta.shape[1], dtype=torch.float64))
