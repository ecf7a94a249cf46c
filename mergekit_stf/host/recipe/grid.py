"""The points of a sweep: values of global parameters, and the recipe that each point merges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.recipe.recipe import Recipe, check_recipe
from mergekit_stf.host.recipe.yaml_text import parse_yaml

MAX_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
        values: the swept parameters and their values here.
        recipe: the checked recipe with these values.
    """

    values: Mapping[str, float]
    recipe: Recipe

    @property
    def name(self) -> str:
        """A name for a folder, such as ``density-0.2_lambda-0.8``."""
        return "_".join(f"{key}-{value:g}" for key, value in self.values.items())


def parse_values(text: str) -> tuple[float, ...]:
    """Read ``0.4,0.8`` or ``0.4:1.2:0.1``, first, last and step, the last included.

    Example:
        >>> parse_values("0.4:0.8:0.2")
        (0.4, 0.6, 0.8)

    Raises:
        STFError: the text is neither a list nor a range.
    """
    try:
        values = [value for part in text.split(",") for value in _part(part)]
    except (InvalidOperation, ValueError) as error:
        raise STFError(
            f"{text!r} is neither a list such as 0.4,0.8 nor a range such as 0.4:1.2:0.1"
        ) from error
    if len(values) > MAX_POINTS:
        raise STFError(f"{text!r} makes more than {MAX_POINTS} values")
    return tuple(dict.fromkeys(values))


def _part(text: str) -> list[float]:
    first, *rest = numbers = [Decimal(number) for number in text.split(":")]
    if not all(number.is_finite() for number in numbers):
        raise ValueError(text)
    if not rest:
        return [float(first)]
    last, step = rest
    if step <= 0 or last < first:
        raise ValueError(text)
    count = min(int((last - first) / step), MAX_POINTS) + 1
    return [float(first + k * step) for k in range(count)]


def grid_points(recipe: Recipe, values: Mapping[str, Sequence[float]]) -> list[Point]:
    """Return the points of the grid, those that share their decompositions one after another.

    Args:
        recipe: the recipe to vary.
        values: of each swept parameter; ``lambda``, on which no decomposition depends, varies
            fastest.

    Raises:
        STFError: a value is not allowed.
    """
    names = sorted(values, key=lambda name: (name == "lambda", name))
    grid = itertools.product(*(values[name] for name in names))
    return [_point(recipe, dict(zip(names, point, strict=True))) for point in grid]


def _point(recipe: Recipe, values: dict[str, float]) -> Point:
    data = parse_yaml(recipe.text, recipe.source).data
    for settings in _settings(data):
        for name in values:
            settings.pop(name, None)
    data["parameters"] = {**(data.get("parameters") or {}), **values}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    where = ", ".join(f"{name} {value:g}" for name, value in values.items())
    return Point(values, check_recipe(text, f"{recipe.source} with {where}"))


def find_overrides(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Return the swept parameters that the recipe sets for single models, layers or filters.

    A sweep gives every weight the same value instead.
    """
    data = parse_yaml(recipe.text, recipe.source).data
    top = data.get("parameters") or {}
    inner = [settings for settings in _settings(data) if settings is not top]
    return [
        name
        for name in names
        if isinstance(top.get(name), (list, dict)) or any(name in s for s in inner)
    ]


def _settings(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every ``parameters`` mapping of a recipe's data."""
    if isinstance(node, list):
        for item in node:
            yield from _settings(item)
    elif isinstance(node, dict):
        for key, inner in node.items():
            if key == "parameters" and isinstance(inner, dict):
                yield inner
            else:
                yield from _settings(inner)
