"""Unknown keys, found by walking a recipe along the host's own pydantic types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from mergekit.merge_methods.registry import registered_methods
from pydantic import BaseModel

from mergekit_stf.host.plugin.parameters import IGNORED
from mergekit_stf.host.recipe.yaml_text import Problem, join_path

PARAMETERS = "parameters"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ``; did you mean 'lambda'?``, or the list of what is known when nothing is near."""
    names = list(known)
    lower = {name.lower(): name for name in names}
    near = get_close_matches(str(word).lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[near[0]]!r}?" if near else f"; known are {', '.join(names)}"


def unknown_keys(value: Any, annotation: Any, path: str = "") -> Iterator[Problem]:
    """Yield one problem for each key that the host would ignore in silence.

    Args:
        value: plain data from YAML.
        annotation: the host's type for it, a pydantic model or a typing construct.
        path: key path of ``value``. What stands under ``parameters`` is checked elsewhere,
            against the merge method.
    """
    members = [*_flatten(annotation)]
    if isinstance(value, dict):
        fields = _fields(members)
        for key, inner in value.items():
            if key in fields:
                if key != PARAMETERS:
                    yield from unknown_keys(inner, fields[key], join_path(path, key))
            elif fields:
                yield Problem(join_path(path, str(key)), _unknown(key, fields))
        for item_type in _arguments(members, dict, 1):
            for key, inner in value.items():
                yield from unknown_keys(inner, item_type, join_path(path, str(key)))
    elif isinstance(value, list):
        for item_type in _arguments(members, list, 0):
            for index, inner in enumerate(value):
                yield from unknown_keys(inner, item_type, join_path(path, index))


def _unknown(key: object, fields: dict[str, Any]) -> str:
    parameters = {p.name for m in registered_methods() for p in m.spec.parameters} | {*IGNORED}
    if key in parameters and PARAMETERS in fields:
        return f"not read here; {key} is a parameter and belongs one level deeper, in «parameters»"
    return f"unknown key{did_you_mean(key, fields)}"


def _flatten(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (list, dict) or not get_args(annotation):
        yield annotation
        return
    for member in get_args(annotation):
        yield from _flatten(member)


def _fields(members: list[Any]) -> dict[str, Any]:
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    return {
        name: field.annotation
        for model in reversed(models)
        for name, field in model.model_fields.items()
    }


def _arguments(members: list[Any], origin: type, position: int) -> Iterator[Any]:
    for member in members:
        if get_origin(member) is origin:
            yield get_args(member)[position]
