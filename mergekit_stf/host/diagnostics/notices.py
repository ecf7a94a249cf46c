"""What a merge has to say aloud, once: ignored parameters, models that are near-duplicates."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_stf.core import Report
from mergekit_stf.host.plugin.parameters import IGNORED

LOG = logging.getLogger("mergekit_stf")

NEAR_DUPLICATE = 0.9
"""Cosine of two task matrices from which they count as near-duplicates of each other."""

_weights: Counter[tuple[str, str]] = Counter()
_damped = 0
_lock = threading.Lock()


def ignored(parameters: Mapping[str, Any]) -> None:
    """Say once which parameters of a TIES recipe have no meaning here."""
    for name in IGNORED:
        if parameters.get(name) is not None:
            _ignored_once(name, str(parameters[name]))


@functools.cache
def once(message: str) -> None:
    """Say something the first time that this process has it to say."""
    LOG.warning("%s", message)


@functools.cache
def _ignored_once(name: str, value: str) -> None:
    LOG.warning("stf has no use for `%s: %s` and ignores it; remove the line", name, value)


def ill_posed(name: str, labels: Sequence[str], reports: Sequence[Report]) -> None:
    """Count a weight whose system was damped, and the pairs of models that are near-duplicates.

    The first weight is said at once, the sum by ``summary`` at the end of the merge.
    """
    global _damped
    damped = [report for report in reports if report.cutoff]
    if not damped:
        return
    pairs = {pair for report in damped for pair in near_duplicates(labels, report)}
    with _lock:
        first = not _damped
        _damped += 1
        _weights.update(pairs)
    if first:
        atexit.register(_summarise)
        LOG.warning("%s: %s", name, _explanation(sorted(pairs)))


def near_duplicates(labels: Sequence[str], report: Report) -> list[tuple[str, str]]:
    """Return the pairs of models whose task matrices point the same or the opposite way.

    The names of a pair are sorted, because the order of tasks differs between weights.
    """
    return [
        (min(labels[i], labels[j]), max(labels[i], labels[j]))
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
        if abs(report.overlaps[i][j]) >= NEAR_DUPLICATE
    ]


def summary() -> str | None:
    """Return one line on all damped weights since the last call, ``None`` if there were none."""
    global _damped
    with _lock:
        pairs, damped = dict(_weights), _damped
        _weights.clear()
        _damped = 0
    if not damped:
        return None
    named = "; ".join(f"{a} and {b} ({count} weights)" for (a, b), count in sorted(pairs.items()))
    return f"{damped} weights were ill-posed and damped{': ' if named else ''}{named}"


def _summarise() -> None:
    if line := summary():
        LOG.warning(line)


def _explanation(pairs: Sequence[tuple[str, str]]) -> str:
    who = "; ".join(f"{a} and {b}" for a, b in pairs) or "the models together"
    return (
        f"{who} ask for contradicting responses to nearly the same features; what they "
        "contradict each other in is damped (`ridge: auto`). Models of one lineage do this: "
        "leave one of them out, or weight them. The number of weights follows at the end"
    )
