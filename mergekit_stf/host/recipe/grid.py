"""The points of a sweep or a comparison: a method, values of parameters, and their recipe."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.recipe.keys import PARAMETERS, did_you_mean
from mergekit_stf.host.recipe.recast import (
    Recast,
    find_missing,
    parameter_names,
    recast,
    spec_of,
    walk_settings,
)
from mergekit_stf.host.recipe.recipe import Recipe, check_recipe
from mergekit_stf.host.recipe.yaml_text import parse_yaml

MAX_POINTS = 1000
METHOD = "method"
"""The value of a point that says its merge method, where several are compared."""

WORD = re.compile(r"[A-Za-z]\w*")
SWITCHES: Mapping[str, bool] = {"true": True, "false": False}

Value = float | str | bool


@dataclass(frozen=True)
class Point:
    """One point of a sweep or of a comparison.

    Attributes:
        values: the swept parameters and their values here; of a comparison the method first.
        recipe: the checked recipe with these values.
    """

    values: Mapping[str, Value]
    recipe: Recipe

    @property
    def name(self) -> str:
        """A name for a folder, such as ``density-0.2_lambda-0.8`` or ``ties_lambda-1``."""
        return "_".join(
            format_value(value) if key == METHOD else f"{key}-{format_value(value)}"
            for key, value in self.values.items()
        )


def format_value(value: Value) -> str:
    """Write a value as in names of folders and in tables: ``0.8``, ``matched``, ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


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


def parse_options(text: str) -> tuple[Value, ...]:
    """Read values of any option: numbers and ranges as `parse_values`, words, true and false.

    Example:
        >>> parse_options("auto,0.1:0.3:0.1")
        ('auto', 0.1, 0.2, 0.3)

    Raises:
        STFError: a value is neither a number nor a word.
    """
    found: list[Value] = []
    for part in text.split(","):
        is_word = WORD.fullmatch(part)
        found += [SWITCHES.get(part, part)] if is_word else list(parse_values(part))
    return tuple(dict.fromkeys(found))


def grid_points(recipe: Recipe, values: Mapping[str, Sequence[Value]]) -> list[Point]:
    """Return the points of a sweep, those that share their decompositions one after another.

    Args:
        recipe: the recipe to vary.
        values: of each swept parameter; ``lambda``, on which no decomposition depends, varies
            fastest.

    Raises:
        STFError: a value is not allowed.
    """
    return [_point(recipe, read_data(recipe), point) for point in _grid(values)]


def method_points(
    recipe: Recipe,
    names: Sequence[str],
    values: Mapping[str, Sequence[Value]],
    defaults: bool = False,
) -> tuple[list[Point], dict[str, Recast]]:
    """Return the points of a comparison, method by method, and how each method got its recipe.

    Args:
        recipe: the recipe to vary.
        names: of the methods, ours and the host's.
        values: of each swept parameter; a method that does not know one is merged without it.
        defaults: each method has its own defaults, see `recast`.

    Raises:
        STFError: there is no such method, no method knows a parameter, a method needs one that
            nothing sets, or a value is not allowed.
    """
    known = {name: parameter_names(spec_of(name)) for name in names}
    every = sorted(set().union(*known.values()))
    for name in values:
        if name not in every:
            raise STFError(
                f"none of these methods has a parameter {name!r}{did_you_mean(name, every)}"
            )
    recasts = {name: recast(read_data(recipe), name, defaults) for name in names}
    found = []
    for name, new in recasts.items():
        own = {key: numbers for key, numbers in values.items() if key in known[name]}
        for point in _grid(own):
            found.append(_point(recipe, copy.deepcopy(new.data), {METHOD: name, **point}))
    return found, recasts


def _grid(values: Mapping[str, Sequence[Value]]) -> Iterator[dict[str, Value]]:
    names = sorted(values, key=lambda name: (name == "lambda", name))
    for point in itertools.product(*(values[name] for name in names)):
        yield dict(zip(names, point, strict=True))


def _point(recipe: Recipe, data: dict[str, Any], values: dict[str, Value]) -> Point:
    """Put values into a recipe's data, in the place of all that it says of them."""
    own = {name: value for name, value in values.items() if name != METHOD}
    for settings in walk_settings(data):
        for name in own:
            settings.pop(name, None)
    data[PARAMETERS] = {**(data.get(PARAMETERS) or {}), **own}
    where = ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
    for name in find_missing(data):
        raise STFError(
            f"{recipe.source} with {where}: {data['merge_method']} needs {name!r}, which the "
            f"recipe does not set; give --vary {name}=VALUES"
        )
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return Point(values, check_recipe(text, f"{recipe.source} with {where}"))


def find_overrides(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Return the swept parameters that the recipe sets for single models, layers or filters.

    A sweep gives every weight the same value instead.
    """
    data = read_data(recipe)
    top = data.get(PARAMETERS) or {}
    inner = [settings for settings in walk_settings(data) if settings is not top]
    return [
        name
        for name in names
        if isinstance(top.get(name), (list, dict)) or any(name in s for s in inner)
    ]


def read_data(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's data, which the caller may change."""
    data: dict[str, Any] = parse_yaml(recipe.text, recipe.source).data
    return data
