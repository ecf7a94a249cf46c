"""The rule of the paper for a weight, from its name: what ``stf`` does with its kind."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_stf.core import methods
from mergekit_stf.host.merging.job import resolve_rule, rule_label
from mergekit_stf.host.merging.kinds import kind_for


def rule_for(name: str | None, shape: Sequence[int], vocabulary_axis: int | None) -> str:
    """Return ``superpose``, ``sum`` or ``mean``."""
    stf = methods.get("stf")
    return rule_label(stf, resolve_rule(stf, kind_for(name, shape, vocabulary_axis), "auto"))
