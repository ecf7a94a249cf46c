"""The measurements: specialists, merges of them by every candidate, what each keeps.

Value of a merge: the mean over its tasks of accuracy as a share of the specialist's (``kept``),
and of the specialist's gain in loss over the base that is left (``gain``). A scale is chosen by
``kept`` on validation; what is reported is the test split, at the default and at that scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.quality.candidates import Candidate, Change, Differences
from benchmarks.quality.tasks import Task
from mergekit_stf.core import STFError

Weights = Mapping[str, Tensor]


class Score(NamedTuple):
    """Share of right answers, and mean loss."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Size:
    """How much is trained and scored.

    Attributes:
        tasks: how many of the bench's, the first ones.
        steps, batch: of each fine-tuning.
        rate: its largest learning rate.
        validation, test: examples of each task that are scored.
        scored_batch: examples at once.
        scales: every how many of the values of lambda are tried.
    """

    tasks: int
    steps: int
    batch: int
    rate: float
    validation: int
    test: int
    scored_batch: int
    scales: int = 1

    def of(self, split: str) -> int:
        """Return how many examples of a split are scored."""
        return self.validation if split == "validation" else self.test


class Bench(Protocol):
    """A base, how to make specialists of it, and how well weights do a task."""

    name: str
    seeds: int
    size: Size
    base: Weights

    def train(self, task: Task, seed: int, adapter: bool = False) -> Differences: ...

    def score(self, weights: Weights, tasks: Sequence[Task], split: str) -> list[Score]: ...


@dataclass(frozen=True)
class Case:
    """Specialists that are merged together.

    Attributes:
        specialists: by name; the first word of a name is the task.
        adapters: low-rank adapters instead of whole models.
    """

    name: str
    specialists: tuple[str, ...]
    adapters: bool = False


class Study:
    """Measures one bench with one seed; ``keep`` gets the figures after each step."""

    def __init__(
        self, bench: Bench, tasks: Sequence[Task], seed: int, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        self.bench, self.seed, self._keep = bench, seed, keep
        self.tasks = {task.name: task for task in tasks}
        self.differences: dict[tuple[str, bool], Differences] = {}
        self.figures: dict[str, Any] = {"seed": seed, "base": {}, "specialists": {}, "cases": {}}
        for name, task in self.tasks.items():
            self.figures["base"][name] = self._both(bench.base, task)

    def specialist(self, name: str, adapter: bool) -> Differences:
        """Return what fine-tuning for a task changed, trained when first asked for.

        ``sorting 1`` and ``sorting 2`` are trained on different halves of the task's examples.
        """
        if (name, adapter) not in self.differences:
            start = time.perf_counter()
            task = self.tasks[name.split()[0]]
            if half := name.partition(" ")[2]:
                task = replace(task, train=task.train[int(half) - 1 :: 2])
            found = self.bench.train(task, self.seed, adapter)
            self.differences[name, adapter] = found
            key = f"{name} adapter" if adapter else name
            alone = Change(self.bench.base, [found]).sum()
            entry = self._both(alone, task) | {"seconds": time.perf_counter() - start}
            self.figures["specialists"][key] = entry
            self._keep(self.figures)
            shown = [f"{entry[split].accuracy:.3f}" for split in ("validation", "test")]
            print(
                f"{key}: base {self.figures['base'][task.name]['test'].accuracy:.3f}, {shown}",
                flush=True,
            )
        return self.differences[name, adapter]

    @torch.no_grad()
    def _merged(self, change: Change, candidate: Candidate) -> Callable[[float], Weights]:
        merged = change.by(candidate)
        if (device := next(iter(self.bench.base.values())).device).type == "cuda":
            torch.cuda.synchronize(device)
        return merged

    def measure(self, case: Case, candidates: Sequence[Candidate]) -> None:
        """Merge a case's specialists by each candidate, and keep what is measured."""
        found = [self.specialist(name, case.adapters) for name in case.specialists]
        change = Change(self.bench.base, found)
        entry = self.figures["cases"].setdefault(
            case.name, {"specialists": case.specialists, "adapters": case.adapters, "methods": {}}
        )
        for candidate in candidates:
            start = time.perf_counter()
            try:
                merged = self._merged(change, candidate)
            except (STFError, RuntimeError) as error:
                entry["methods"][candidate.label] = {"error": str(error)}
                print(f"{case.name}, {candidate.label}: {error}", flush=True)
                continue
            seconds = time.perf_counter() - start
            figures = self._candidate(case, candidate, merged) | {"seconds": seconds}
            entry["methods"][candidate.label] = figures
            self._keep(self.figures)
            at, best = figures["default"], figures["best"]
            print(
                f"{case.name}, {candidate.label}: {100 * at['kept']:.1f} at {at['lambda']:g}, "
                f"{100 * best['kept']:.1f} at {best['lambda']:g} ({seconds:.1f} s to merge)",
                flush=True,
            )

    def _candidate(
        self, case: Case, candidate: Candidate, merged: Callable[[float], Weights]
    ) -> dict[str, Any]:
        grid = []
        for scale in candidate.scales[:: self.bench.size.scales]:
            grid.append({"lambda": scale, **self._value(case, merged(scale), "validation")})
        default = {"lambda": candidate.scale, **self._value(case, merged(candidate.scale), "test")}
        if not grid:
            return {"grid": [], "default": default, "best": default}
        scale = max(grid, key=lambda point: point["kept"])["lambda"]
        best = {"lambda": scale, **self._value(case, merged(scale), "test")}
        kept = ("lambda", "kept", "gain")
        points = [{key: point[key] for key in kept} for point in grid]
        return {"grid": points, "default": default, "best": best}

    def _value(self, case: Case, weights: Weights, split: str) -> dict[str, Any]:
        kept, gain, accuracy = [], [], {}
        names = list(dict.fromkeys(name.split()[0] for name in case.specialists))
        scores = self.bench.score(weights, [self.tasks[name] for name in names], split)
        for name, found in zip(names, scores, strict=True):
            mine = [each for each in case.specialists if each.split()[0] == name]
            keys = [f"{each} adapter" if case.adapters else each for each in mine]
            alone = [self.figures["specialists"][key][split] for key in keys]
            target = max(score.accuracy for score in alone)
            least = min(score.loss for score in alone)
            start = self.figures["base"][name][split].loss
            accuracy[name] = found.accuracy
            kept.append(found.accuracy / target if target else math.nan)
            gain.append((start - found.loss) / (start - least))
        means = {"kept": sum(kept) / len(kept), "gain": sum(gain) / len(gain)}
        return {**means, "accuracy": accuracy}

    def _both(self, weights: Weights, task: Task) -> dict[str, Score]:
        splits = ("validation", "test")
        return {split: self.bench.score(weights, [task], split)[0] for split in splits}
