"""Names of weights as messages write them: one a kind, whatever its layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def collapse_layers(names: Iterable[str]) -> str:
    """Name each kind of weight once, its layers as a star and a count."""
    kinds = Counter(map(kind_of, names))
    return ", ".join(f"{kind} ({n})" if "*" in kind else kind for kind, n in kinds.items())


def kind_of(name: str) -> str:
    """Return a weight's name with a star for each number, the same in every layer."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)
