"""The parameters of a recipe against the merge method's own declaration of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.config import ConditionalParameter
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import ValidationError

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.core.methods.options import decimal_comma
from mergekit_stf.host.plugin.parameters import IGNORED
from mergekit_stf.host.recipe.keys import PARAMETERS, did_you_mean, unknown_keys
from mergekit_stf.host.recipe.models import groups, mappings, reference, sections
from mergekit_stf.host.recipe.yaml_text import Problem, join_path, short_repr

OTHER_NAMES: Mapping[str, str] = {
    "gamma": "lambda",
    "epsilon": "ridge",
    "eta": "density",
    "scale": "lambda",
}


def parameter_problems(data: dict[Any, Any]) -> Iterator[Problem]:
    """Yield unknown names, misplaced parameters and values out of range, at every level."""
    spec = _spec(data)
    if spec is None:
        return
    known = {parameter.name: parameter for parameter in spec.parameters}
    for path, settings, per_model in _places(data):
        if not isinstance(settings, dict):
            yield Problem(
                path, f"expected a mapping of names to values; got {short_repr(settings)}"
            )
            continue
        for name, value in settings.items():
            where = join_path(path, str(name))
            if name not in known:
                yield Problem(where, _after_comma(name, value) or _unknown(spec, str(name), known))
            elif not _is_legacy(spec, name):
                yield from _placed(known[name], where, per_model)
                yield from _value_problems(known[name], value, where)


def parameter_warnings(data: dict[Any, Any]) -> Iterator[Problem]:
    """Yield what a legal recipe says in vain.

    That is a parameter that STF has no use for, one that is given to the base model, and a
    condition that follows a condition without a filter.
    """
    spec = _spec(data)
    if spec is None:
        return
    for path, settings, _ in _places(data):
        for name, value in settings.items():
            where = join_path(path, str(name))
            if _is_legacy(spec, name):
                yield Problem(where, f"ignored: {spec.name} has no use for it")
            yield from _unreachable(value, where)
    yield from _base_settings(data, spec)


def filters(data: dict[Any, Any]) -> Iterator[str]:
    """Yield every filter of a legal recipe."""
    for _, settings, _ in _places(data):
        for value in settings.values():
            conditions = value if isinstance(value, list) else [value]
            for condition in conditions:
                if isinstance(condition, dict) and condition.get("filter"):
                    yield condition["filter"]


def _spec(data: dict[Any, Any]) -> MergeMethodSpec | None:
    specs = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
    name = data.get("merge_method")
    return specs.get(name) if isinstance(name, str) else None


def _is_legacy(spec: MergeMethodSpec, name: Any) -> bool:
    return methods.is_known(spec.name) and name in IGNORED


def _unknown(spec: MergeMethodSpec, name: str, known: dict[str, ParameterSpec]) -> str:
    if methods.is_known(spec.name) and OTHER_NAMES.get(name) in known:
        return f"not a parameter of {spec.name}; it is called {OTHER_NAMES[name]!r} here"
    return f"not a parameter of {spec.name}{did_you_mean(name, known)}"


def _after_comma(name: Any, value: Any) -> str:
    """Say what a number without a value is: in ``{density: 0,5}`` the comma ends the entry."""
    if value is None and str(name).isdigit():
        return "a comma ends an entry; write the number before it with a point, as in 0.5"
    return ""


def _places(data: dict[Any, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield path and value of every ``parameters``, and whether it belongs to one model."""
    for path, section in sections(data):
        yield from _settings(path, section, False)
        for where, part in mappings(section.get("slices"), join_path(path, "slices")):
            yield from _settings(where, part, False)
    for group in groups(data):
        for path, entry in group.entries:
            yield from _settings(path, entry, True)


def _settings(path: str, owner: dict[Any, Any], per_model: bool) -> Iterator[tuple[str, Any, bool]]:
    if owner.get(PARAMETERS) is not None:
        yield join_path(path, PARAMETERS), owner[PARAMETERS], per_model


def _placed(parameter: ParameterSpec, where: str, per_model: bool) -> Iterator[Problem]:
    if per_model and parameter.scope == ParameterScope.SHARED:
        message = (
            "holds for all models at once and is ignored here; move it to the top «parameters»"
        )
        yield Problem(where, message)


def _value_problems(parameter: ParameterSpec, value: Any, where: str) -> Iterator[Problem]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield from _conditional(parameter, item, join_path(where, index))
            else:
                message = (
                    f"expected «filter» and «value» like its neighbours; got {short_repr(item)}"
                )
                yield Problem(join_path(where, index), message)
    elif isinstance(value, dict):
        yield from _conditional(parameter, value, where)
    else:
        yield from _scalars(parameter, value, where)


def _conditional(parameter: ParameterSpec, item: dict[Any, Any], where: str) -> Iterator[Problem]:
    yield from unknown_keys(item, ConditionalParameter, where)
    if not isinstance(item.get("filter"), (str, type(None))):
        yield Problem(
            join_path(where, "filter"),
            f"expected a part of a name; got {short_repr(item['filter'])}",
        )
    if "value" not in item:
        yield Problem(where, "missing «value»")
    else:
        yield from _scalars(parameter, item["value"], join_path(where, "value"))


def _scalars(parameter: ParameterSpec, value: Any, where: str) -> Iterator[Problem]:
    if value == []:
        yield Problem(where, "an empty list; give a value or a list of values")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalar(parameter, item, join_path(where, index))
    else:
        yield from _scalar(parameter, value, where)


def _scalar(parameter: ParameterSpec, value: Any, where: str) -> Iterator[Problem]:
    if not isinstance(value, (bool, int, float, str)):
        yield Problem(where, f"expected a single value; got {short_repr(value)}")
        return
    if comma := decimal_comma(value):
        yield Problem(where, f"{comma}, got {short_repr(value)}")
        return
    try:
        parameter.validate(value)
    except ValidationError as error:
        yield Problem(where, f"{error.errors()[-1]['msg']}; got {short_repr(value)}")
    except STFError as error:
        yield Problem(where, str(error).removeprefix(f"parameter `{parameter.name}`: "))


def _unreachable(value: Any, where: str) -> Iterator[Problem]:
    conditions = list(mappings(value, where))
    for index, (_, condition) in enumerate(conditions[:-1]):
        if condition.get("filter") in (None, "*"):
            path = conditions[index + 1][0]
            yield Problem(path, "never used: the condition before it holds for every weight")
            return


def _base_settings(data: dict[Any, Any], spec: MergeMethodSpec) -> Iterator[Problem]:
    non_base = {p.name for p in spec.parameters if p.scope == ParameterScope.NON_BASE}
    for group in groups(data):
        for path, entry in group.entries:
            same = group.base is not None and reference(entry.get("model")) == reference(group.base)
            for name in sorted(non_base & set(entry.get(PARAMETERS) or ())) if same else ():
                where = join_path(join_path(path, PARAMETERS), name)
                yield Problem(where, "ignored: this is the base model, which has no task matrix")
