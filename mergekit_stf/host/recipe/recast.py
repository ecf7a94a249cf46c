"""The recipe of one merge method as a recipe of another, one word changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import BasePolicy, MergeMethodSpec
from mergekit.merge_methods.registry import registered_methods

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.core.methods import Option
from mergekit_stf.host.plugin.parameters import IGNORED
from mergekit_stf.host.recipe.keys import PARAMETERS, did_you_mean
from mergekit_stf.host.recipe.models import mappings, reference, sections

LAYOUT = ("weight", "rule", "split")
"""What a recipe says of its models and weights, not of how a method is tuned."""


@dataclass(frozen=True)
class Recast:
    """A recipe's data for another method.

    Attributes:
        data: plain data, as from YAML.
        dropped: names of parameters that the method does not know, or for which it was to have its
            own defaults.
        without_base: the base model was left out, as the method would average it with the others.
    """

    data: dict[str, Any]
    dropped: tuple[str, ...] = ()
    without_base: bool = False


def recast(data: dict[str, Any], method: str, defaults: bool = False) -> Recast:
    """Change the method of a recipe, and keep what the other method knows.

    A parameter is kept if the other method has one of that name. An option of a method of ours is
    kept only if the other has the same one: the ``ridge`` of ``stf`` is not that of ``wudi``. Where
    the method wants a ``weight`` for each model and has no default, it gets our own, 1. Methods
    without a base model lose it, as the host would merge it with the others.

    Args:
        data: of a checked recipe; it is changed.
        method: the name of a method, ours or the host's.
        defaults: leave to the method all but ``weight``, ``rule`` and ``split``.

    Raises:
        STFError: there is no such method.
    """
    after = spec_of(method)
    known = parameter_names(after)
    before = _options(str(data["merge_method"]))
    same = {name for name in known if before.get(name) == _options(method).get(name)}
    kept = same & set(LAYOUT) if defaults else same
    dropped: dict[str, None] = {}
    for settings in walk_settings(data):
        for name in [name for name in settings if name not in kept]:
            del settings[name]
            dropped[name] = None
    without_base = after.contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)
    if without_base:
        _leave_out_base(data)
    if any(parameter.required and parameter.name == "weight" for parameter in after.parameters):
        data[PARAMETERS] = {"weight": 1.0, **(data.get(PARAMETERS) or {})}
    return Recast(data | {"merge_method": method}, tuple(dropped), without_base)


def spec_of(method: str) -> MergeMethodSpec:
    """Return what the host knows of a method.

    Raises:
        STFError: there is no such method.
    """
    specs = {found.spec.name: found.spec for found in registered_methods()}
    if method not in specs:
        raise STFError(f"there is no merge method {method!r}{did_you_mean(method, sorted(specs))}")
    return specs[method]


def parameter_names(spec: MergeMethodSpec) -> set[str]:
    """Return the parameters that a method uses; ours accept some of a TIES recipe besides."""
    ignored = IGNORED if methods.is_known(spec.name) else ()
    return {parameter.name for parameter in spec.parameters} - set(ignored)


def find_missing(data: dict[str, Any]) -> list[str]:
    """Return the parameters without a default that the recipe's method needs and nothing sets."""
    found = {name for settings in walk_settings(data) for name in settings}
    needed = [p.name for p in spec_of(data["merge_method"]).parameters if p.required]
    return [name for name in needed if name not in found]


def walk_settings(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every ``parameters`` mapping of a recipe's data."""
    if isinstance(node, list):
        for item in node:
            yield from walk_settings(item)
    elif isinstance(node, dict):
        for key, inner in node.items():
            if key == PARAMETERS and isinstance(inner, dict):
                yield inner
            else:
                yield from walk_settings(inner)


def _options(method: str) -> dict[str, Option]:
    """Return the options that a method of ours has for itself; none of the host's."""
    own = methods.get(method).options if methods.is_known(method) else ()
    return {option.name: option for option in own}


def _leave_out_base(data: dict[str, Any]) -> None:
    base = data.pop("base_model", None)
    for _, section in sections(data):
        _leave_out(section, "models", base)
        for _, part in mappings(section.get("slices"), ""):
            _leave_out(part, "sources", part.pop("base_model", None) or base)


def _leave_out(owner: dict[Any, Any], key: str, base: Any) -> None:
    """Take a model out of a list of models, if there is the one and the other."""
    if base is not None and owner.get(key):
        left = reference(base)
        owner[key] = [item for item in owner[key] if reference(item["model"]) != left]
