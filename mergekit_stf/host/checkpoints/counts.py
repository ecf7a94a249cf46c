"""Numbers in a configuration that decide how many modules a model has.

Whoever reads a configuration builds as many modules as it says, so a damaged or hostile one would
take all time and memory before the first weight is missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_stf.core.errors import STFError

_MODULES = re.compile(r"(layers?|blocks|depths?|experts)$")
_LABELS = re.compile(r"labels$")
MODULES = 1000
"""Modules that any configuration may ask for: transformers builds as many in a second."""
LABELS = 1_000_000
"""Labels of a classifier that any configuration may ask for: each costs one name."""


def check_counts(settings: dict[str, Any], path: Path, weights: int) -> None:
    """Refuse a configuration of more layers or experts than the checkpoint has weights.

    Args:
        settings: the configuration.
        path: where it was read, for the message.
        weights: how many weights the checkpoint holds.

    Raises:
        STFError: with the setting, its value and the number of weights.
    """
    for key, value in _counts(settings, ""):
        least = LABELS if _LABELS.search(key) else MODULES
        if value > max(least, weights):
            raise STFError(
                f"{path}: {key} is {value:.6g}, and the checkpoint holds {weights} weights; "
                "the configuration is damaged or of another model, fetch or copy it again"
            )


def _counts(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """Yield every whole number whose key says that it counts modules, also in nested settings."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _counts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner, key)
    elif isinstance(value, int) and (_MODULES.search(key) or _LABELS.search(key)):
        yield key, value
