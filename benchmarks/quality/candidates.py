"""The ways to merge that are compared: ours as the product runs them, the host's by its code.

Models lie in memory: a weight is a ``WeightJob``, merged once, and finished for each lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_stf.core import LowRank, methods
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.merging.job import (
    Task,
    WeightJob,
    check_inputs,
    finish,
    is_copied,
    merge_matrix,
)
from mergekit_stf.host.merging.kinds import kind_for

Differences = Mapping[str, "Tensor | LowRank"]
"""The tensors of a tuned model by name, or what an adapter adds, in factors."""

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Candidate:
    """A method with its settings.

    Attributes:
        label: for tables.
        method: its name, of ours or of the host's.
        options: of the method.
        density: of each model.
        rules: what a kind of weight gets instead of what the method gives it.
        factors: of M by kind.
        depth: factors of M in the first and in the last layer, linear between.
        scales: values of lambda that are tried on validation.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    density: float = 1.0
    rules: Mapping[Kind, str] = field(default_factory=dict)
    factors: Mapping[Kind, float] = field(default_factory=dict)
    depth: tuple[float, float] = (1.0, 1.0)
    scales: tuple[float, ...] = SCALES

    @property
    def scale(self) -> float:
        """Lambda where the recipe says nothing."""
        return methods.get(self.method).default_lambda if methods.is_known(self.method) else 1.0


class Change:
    """What several specialists changed of a base."""

    def __init__(self, base: Mapping[str, Tensor], found: Sequence[Differences]) -> None:
        self.base, self.found = base, found
        self.squares: list[float] | None = None

    def sum(self) -> Mapping[str, Tensor]:
        """Return the base with everything added; of one specialist, itself."""
        return {
            name: base + sum(self._tuned(name, one) - base for one in self.found)
            if len(self.found) > 1
            else self._tuned(name, self.found[0])
            for name, base in self.base.items()
        }

    def by(self, candidate: Candidate) -> Callable[[float], Mapping[str, Tensor]]:
        """Merge by a method; the answer takes lambda and returns weights."""
        known = methods.is_known(candidate.method)
        return self._ours(candidate) if known else self._host(candidate)

    def _tuned(self, name: str, found: Differences) -> Tensor:
        change = found.get(name)
        if isinstance(change, LowRank):
            return self.base[name] + change.dense()
        return self.base[name] if change is None else change

    def _squares(self) -> list[float]:
        """Return the squared length of each model's whole difference to the base."""
        if self.squares is None:
            self.squares = [
                sum(
                    float((self._tuned(name, one) - base).double().square().sum())
                    for name, base in self.base.items()
                )
                for one in self.found
            ]
        return self.squares

    def _job(self, candidate: Candidate, name: str) -> WeightJob:
        base, tasks = self.base[name], []
        for index, found in enumerate(self.found):
            change = found.get(name)
            tuned, delta = (None, change) if isinstance(change, LowRank) else (change, None)
            task = Task(str(index), tuned, delta, density=candidate.density)
            tasks.append(replace(task, squared_distance=self._squares()[index]))
        method = methods.get(candidate.method)
        options = {option.name: option.default for option in method.options}
        kind = kind_for(name, base.shape, None)
        rule = candidate.rules.get(kind, "auto")
        options |= candidate.options
        return WeightJob(name, kind, base, tuple(tasks), method.name, options, rule)

    def _ours(self, candidate: Candidate) -> Callable[[float], Mapping[str, Tensor]]:
        jobs = [self._job(candidate, name) for name in self.base]
        copied = {job.name: job.base for job in jobs if is_copied(job)}
        jobs = [job for job in jobs if job.name not in copied]
        for job in jobs:
            check_inputs(job)
        merged = [merge_matrix(job) for job in jobs]

        def at(scale: float) -> Mapping[str, Tensor]:
            found = dict(copied)
            for job, M in zip(jobs, merged, strict=True):
                factor = candidate.factors.get(job.kind, 1.0) * self._depth(candidate, job.name)
                found[job.name] = finish(replace(job, scale=scale * factor), M).tensor
            return found

        return at

    def _depth(self, candidate: Candidate, name: str) -> float:
        first, last = candidate.depth
        if (layer := _layer(name)) is None:
            return 1.0
        deepest = max(_layer(other) or 0 for other in self.base)
        return first + (last - first) * layer / max(deepest, 1)

    def _host(self, candidate: Candidate) -> Callable[[float], Mapping[str, Tensor]]:
        torch.manual_seed(0)
        method = registry.get(candidate.method)
        ids = range(1, len(self.found) + 1)
        given = {p.name: p.default for p in method.spec.parameters}
        given |= {
            "weight": dict.fromkeys(ids, 1.0),
            "density": dict.fromkeys(ids, candidate.density),
        }
        given |= candidate.options
        changes = {}
        for name, base in self.base.items():
            tensors = [base, *(self._tuned(name, one) for one in self.found)]
            group = TensorGroup.from_tensors(tensors, base_index=0, name=name)
            changes[name] = method.merge_group(group, **given) - base
        return lambda scale: {
            name: base + scale * changes[name] for name, base in self.base.items()
        }


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
