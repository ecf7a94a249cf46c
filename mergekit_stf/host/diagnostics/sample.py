"""Which weights of a large merge to read: all kinds, spread over the layers."""

from __future__ import annotations

from collections.abc import Sequence


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Return a weight's layer, the first number in its name, and its kind, the name without it.

    Example:
        >>> place("model.layers.3.mlp.up_proj.weight")
        (3, 'model.layers.*.mlp.up_proj')
    """
    parts = name.removesuffix(".weight").split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    return layer, ".".join("*" if part.isdigit() else part for part in parts)


def spread(names: Sequence[str], count: int) -> list[str]:
    """Choose about ``count`` names, at least one of each kind, evenly over the layers.

    Returns:
        The chosen names in their order.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(layer_and_kind(name)[1], []).append(name)
    if not kinds or count >= len(names):
        return list(names)
    each = max(1, count // len(kinds))
    chosen = {name for members in kinds.values() for name in _evenly(members, each)}
    return [name for name in names if name in chosen]


def _evenly(members: Sequence[str], count: int) -> list[str]:
    if count >= len(members):
        return list(members)
    if count == 1:
        return [members[len(members) // 2]]
    last = len(members) - 1
    return [members[round(step * last / (count - 1))] for step in range(count)]
