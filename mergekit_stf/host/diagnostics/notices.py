"""What a merge has to say aloud: each kind of warning once, with a count at its end."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from mergekit_stf.core import Record

LOG = logging.getLogger("mergekit_stf")

NEAR_DUPLICATE = 0.9
"""Cosine of two task matrices from which they count as near-duplicates of each other."""

ILL_POSED = "ill-posed"


@dataclass(frozen=True)
class Notice:
    """A warning that a merge says once, however many weights cause it.

    Attributes:
        kind: what it is about; of each kind the first is said.
        text: the warning.
        pairs: the models concerned, two by two.
    """

    kind: str
    text: str
    pairs: tuple[tuple[str, str], ...] = ()


class Notices:
    """Says the notices of one merge; safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()

    def say(self, notices: Iterable[Notice]) -> None:
        """Say what has not been said, and count the rest."""
        for notice in notices:
            with self._lock:
                first = not self._said[notice.kind]
                self._said[notice.kind] += 1
                self._pairs.update(notice.pairs)
            if first:
                LOG.warning("%s", notice.text)

    def summary(self) -> str | None:
        """Return one line on all damped weights, None if there were none."""
        damped = self._said[ILL_POSED]
        if not damped:
            return None
        pairs = sorted(self._pairs.items())
        named = "; ".join(f"{a} and {b} ({count} weights)" for (a, b), count in pairs)
        return f"{damped} weights were ill-posed and damped{': ' if named else ''}{named}"

    def close(self) -> None:
        """Say the summary."""
        if line := self.summary():
            LOG.warning("%s", line)


@functools.cache
def say_once(text: str) -> None:
    """Say something once in this process, where it belongs to no merge of ours."""
    LOG.warning("%s", text)


def find_ill_posed(record: Record) -> Iterator[Notice]:
    """Yield a notice where the system of a weight was damped."""
    if record.cutoff:
        pairs = tuple(find_near_duplicates(record))
        yield Notice(ILL_POSED, f"{record.name}: {_explanation(pairs)}", pairs)


def find_near_duplicates(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the pairs of models whose task matrices point the same or the opposite way.

    The names of a pair are sorted, because the order of tasks differs between weights.
    """
    for i, j in combinations(range(len(record.models)), 2):
        if abs(record.cosine[i][j]) >= NEAR_DUPLICATE:
            first, second = sorted((record.models[i], record.models[j]))
            yield first, second


def _explanation(pairs: Iterable[tuple[str, str]]) -> str:
    who = "; ".join(f"{a} and {b}" for a, b in pairs) or "the models together"
    return (
        f"{who} ask for contradicting responses to nearly the same features; what they "
        "contradict each other in is damped (`ridge: auto`). Models of one lineage do this: "
        "leave one of them out, or weight them. The number of weights follows at the end"
    )
