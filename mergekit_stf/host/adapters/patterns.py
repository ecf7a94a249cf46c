"""Regular expressions of an adapter's configuration, compiled and matched in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from functools import lru_cache

import regex

LENGTH = 10_000
"""Characters of a pattern: one that spells out every module of a large model has a few thousand."""

REPEATS = 1000
"""Product of the counts in braces, which the engine unrolls while it compiles: 10^6 take 1 s and,
around ninety groups, 9 GB."""

PATIENCE = 1.0
"""Seconds after which the patterns of an adapter, if they backtrack without end, are given up."""

_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def pattern_problem(pattern: str) -> str | None:
    """Say why a pattern is no regular expression that can be used here, None if it can."""
    if len(pattern) > LENGTH:
        return f"has {len(pattern)} characters, at most {LENGTH} are read"
    counts = [max(int(n[:9]) for n in (a, b or "", "1") if n) for a, b in _COUNT.findall(pattern)]
    if math.prod(counts) > REPEATS:
        return f"repeats a part more than {REPEATS} times"
    try:
        _compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    return None


class Matcher:
    """Finds patterns in names of modules, for one adapter.

    Args:
        patterns: in the order in which PEFT tries them.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._left = PATIENCE

    def first(self, module: str) -> str | None:
        """Return the first pattern that PEFT would find at the end of a module's name.

        Raises:
            TimeoutError: the patterns of the adapter have taken too long together.
        """
        started = time.perf_counter()
        try:
            return next((p for p in self._patterns if self._matches(p, module)), None)
        finally:
            self._left -= time.perf_counter() - started

    def _matches(self, pattern: str, module: str) -> bool:
        timeout = max(self._left, 1e-3)
        return _compile(pattern).match(module, timeout=timeout) is not None


@lru_cache(maxsize=8192)
def _compile(pattern: str) -> regex.Pattern[str]:
    return regex.compile(rf"(.*\.)?({pattern})$")
