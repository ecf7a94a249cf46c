"""What a report says, from the records of a merge and the preservation measured afterwards."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePath

from mergekit_stf.host.diagnostics.notices import NEAR_DUPLICATE
from mergekit_stf.host.diagnostics.preservation import Preservation
from mergekit_stf.host.diagnostics.records import Record

BLOWN_UP = 2.0
NORM_SPREAD = 3.0


@dataclass(frozen=True)
class Remark:
    """A warning: one sentence that says what, and one that says what to do."""

    what: str
    advice: str


NOTHING = Remark(
    "No weight of any model differs from the base, so nothing was merged.",
    "Check the paths in the recipe.",
)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: name of the merged model.
        recipe: the recipe's text.
        records: one for each weight, in the order of the merge.
        preservation: measured weights, possibly a sample.
        labels: short names of the tuned models.
        notices: warnings, the gravest first.
        output: one line on what holds for the output as a whole.
    """

    title: str
    recipe: str
    records: Sequence[Record]
    preservation: Sequence[Preservation] = ()
    labels: Sequence[str] = field(default=())
    notices: Sequence[Remark] = field(default=())
    output: str = ""

    @property
    def method(self) -> str:
        """The merge method, nothing where nothing was merged."""
        return self.records[0].method if self.records else ""

    @property
    def linear(self) -> list[Record]:
        """The records of linear maps, which the method merged by its own rule."""
        return linear_maps(self.records)

    @property
    def comparable(self) -> list[Record]:
        """Those of them whose models are the ones that ``labels`` names."""
        return _of(self.linear, common_models(self.records))


def build_report(
    title: str,
    recipe: str,
    records: Sequence[Record],
    preservation: Sequence[Preservation],
    output: str = "",
    faults: Sequence[str] = (),
) -> Report:
    """Assemble a report; ``output`` and ``faults`` are what the check of the output found."""
    models = common_models(records)
    labels = short_labels(models)
    merged = linear_maps(records)
    found = _notices(merged, _of(merged, models), labels) if records else [NOTHING]
    notices = [*map(_fault, faults), *found]
    return Report(title, recipe, records, preservation, labels, notices, output)


def common_models(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the models that most weights were merged from; slices may have others each."""
    counts = Counter(tuple(record.models) for record in records)
    return counts.most_common(1)[0][0] if counts else ()


def linear_maps(records: Sequence[Record]) -> list[Record]:
    """Return the records that tell of task matrices.

    Vectors, which methods that go entry by entry merge too, are none: few entries are soon alike.
    """
    return [record for record in records if record.norms and len(record.shape) > 1]


def _of(records: Sequence[Record], models: tuple[str, ...]) -> list[Record]:
    return [record for record in records if tuple(record.models) == models]


def without_common_start(kinds: Sequence[str]) -> list[str]:
    """Drop the dotted parts that all names start with, and keep at least the last part."""
    parts = [kind.split(".") for kind in kinds]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[: shared + 1] == parts[0][: shared + 1]
                                 for p in parts):  # fmt: skip
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def short_labels(models: Sequence[str]) -> list[str]:
    """Number the models and shorten their paths to their last part."""
    return [
        f"{number} {re.sub('[^ -~]', '?', PurePath(model).name or model)[:24]}"
        for number, model in enumerate(models, start=1)
    ]


def mean_cosine(records: Sequence[Record]) -> list[list[float]]:
    """Average the interference of each pair of tasks over the weights, each counting once."""
    tasks = range(len(records[0].models))
    return [[statistics.fmean(r.cosine[i][j] for r in records) for j in tasks] for i in tasks]


def strongest_cosine(record: Record) -> float | None:
    """Return the largest ``|cosine|`` between two tasks, None where there are no two."""
    pairs = combinations(range(len(record.cosine)), 2)
    return max((abs(record.cosine[i][j]) for i, j in pairs), default=None)


def _fault(fault: str) -> Remark:
    return Remark(f"The output: {fault}.", "docs/safety.md says what is checked and what to do.")


def _notices(
    merged: Sequence[Record], comparable: Sequence[Record], labels: Sequence[str]
) -> Iterator[Remark]:
    yield from _duplicates(comparable, labels)
    yield from _solves(merged)
    yield from _models(comparable, labels)


def _duplicates(solved: Sequence[Record], labels: Sequence[str]) -> Iterator[Remark]:
    pairs = Counter(
        pair
        for record in solved
        for pair in combinations(range(len(labels)), 2)
        if abs(record.cosine[pair[0]][pair[1]]) > NEAR_DUPLICATE
    )
    for (i, j), count in pairs.most_common():
        yield Remark(
            f"{labels[i]} and {labels[j]} changed {count} of {len(solved)} linear maps alike "
            f"(cosine beyond ±{NEAR_DUPLICATE}).",
            "They are near-duplicates or of one lineage: leave one of them out of the recipe.",
        )


def _solves(solved: Sequence[Record]) -> Iterator[Remark]:
    if unmet := [record for record in solved if record.converged is False]:
        yield Remark(
            f"The solve did not converge for {_some(unmet)}: residual up to "
            f"{max(record.residual or 0 for record in unmet):.1e}.",
            "Look for near-duplicate models, or set ridge: 0.01 for these weights.",
        )
    if damped := [record for record in solved if record.cutoff]:
        yield Remark(
            f"Tasks contradict each other in {_some(damped)}, and the solve was damped there.",
            "The merge is stable, but contradicting features are shared instead of exact.",
        )
    long = [r for r in solved if (r.norm_merged or 0) > BLOWN_UP * (r.norm_sum or 0) > 0]
    if long:
        yield Remark(
            f"{_some(long)} became more than {BLOWN_UP:g} × as long as the sum of the tasks.",
            "Tasks cancel each other there; a smaller lambda or a ridge tames it.",
        )


def _models(solved: Sequence[Record], labels: Sequence[str]) -> Iterator[Remark]:
    totals = [sum(r.norms[i] ** 2 for r in solved) ** 0.5 for i in range(len(labels))]
    for label, total in zip(labels, totals, strict=True):
        if solved and total == 0:
            yield Remark(
                f"{label} does not differ from the base in any linear map.",
                "Check its path: it adds next to nothing to the merge.",
            )
    changed = [total for total in totals if total > 0]
    if changed and max(changed) > NORM_SPREAD * min(changed):
        large, small = (labels[totals.index(pick(changed))] for pick in (max, min))
        yield Remark(
            f"{large} changed the base {max(changed) / min(changed):.1f} × as much as {small}.",
            "It will dominate the merge: a smaller weight for it evens that out.",
        )


def _some(records: Sequence[Record]) -> str:
    count = len(records)
    return records[0].name if count == 1 else f"{count} weights ({records[0].name} and others)"
