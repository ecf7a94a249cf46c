"""The models that a recipe merges: where they are listed, and what can be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods.base import BasePolicy
from pydantic import ValidationError

from mergekit_stf.core import methods
from mergekit_stf.host.checkpoints.weight_files import gguf_problem
from mergekit_stf.host.recipe.yaml_text import Problem, join_path, short_repr

SEPARATORS: Mapping[str, str] = {
    "+": "that an adapter follows, as in «path+adapter»",
    "@": "that a revision follows, as in «name@revision»",
}


@dataclass(frozen=True)
class Group:
    """One list of models that are merged with each other.

    Attributes:
        path: key path of the list.
        entries: key path and mapping of each model in it.
        base: what ``base_model`` says for this group, or None.
        sliced: whether the entries are ranges of layers (the host then adds no base by itself).
    """

    path: str
    entries: tuple[tuple[str, dict[Any, Any]], ...]
    base: Any
    sliced: bool


def mappings(value: Any, path: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the mappings in a list, with their key paths; anything else is left to the types."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield join_path(path, index), item


def sections(data: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the recipe itself and each of its modules: the places that list models or slices."""
    yield "", data
    modules = data.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict):
            yield join_path("modules", str(name)), module


def groups(data: dict[Any, Any]) -> Iterator[Group]:
    """Yield every group of models of a recipe, at the top level and in modules and slices."""
    base = data.get("base_model")
    for path, section in sections(data):
        models = join_path(path, "models")
        entries = tuple(mappings(section.get("models"), models))
        if entries:
            yield Group(models, entries, base, sliced=False)
        for where, part in mappings(section.get("slices"), join_path(path, "slices")):
            sources = join_path(where, "sources")
            entries = tuple(mappings(part.get("sources"), sources))
            yield Group(sources, entries, part.get("base_model") or base, sliced=True)


def model_problems(data: dict[Any, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the references, the paths and the make-up of the groups."""
    if data.get("base_model") is not None:
        yield from _reference_problems(data["base_model"], "base_model")
    for group in groups(data):
        for path, entry in group.entries:
            if "model" in entry:
                yield from _reference_problems(entry["model"], join_path(path, "model"))
        yield from _group_problems(group, data.get("merge_method"))
        if group.sliced:
            yield from _range_problems(group)


def reference(value: Any) -> ModelReference | None:
    """Parse a model reference as the host does; None when it cannot."""
    try:
        return ModelReference.model_validate(value)
    except (ValidationError, RuntimeError, RecursionError):
        return None


def _reference_problems(value: Any, path: str) -> Iterator[Problem]:
    for sign, meaning in SEPARATORS.items():
        if isinstance(value, str) and sign in value and os.path.isdir(value):
            yield Problem(
                path,
                f"{short_repr(value)} is a directory, but «{sign}» means {meaning}; rename the "
                f"directory, or give a link to it whose name has no «{sign}»",
            )
            return
    parsed = reference(value)
    if parsed is None:
        yield Problem(
            path,
            f"not a model: {short_repr(value)}; write «path», «path+adapter» or «path@revision»",
        )
        return
    for part in [parsed.model] + [parsed.lora] * (parsed.lora is not None):
        problem = path_problem(part.path)
        if problem:
            yield Problem(path, problem)


def path_problem(path: str) -> str | None:
    """Say why a model's path can be neither a local directory nor the name of a hub model."""
    try:
        path.encode()
        if os.path.isdir(path):
            return None
        if os.path.exists(path) and path.endswith(".gguf"):
            return gguf_problem(Path(path))
        if os.path.exists(path):
            return f"{short_repr(path)} is a file; give the model's directory"
    except ValueError:
        return f"{short_repr(path)} cannot be a path"
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        hint = "; ~ is not expanded here" if path.startswith("~") else ""
        return f"no directory {short_repr(path)}{hint}"
    try:
        validate_repo_id(path)
    except HFValidationError:
        return f"{short_repr(path)} is neither a directory nor the name of a hub model"
    return None


def _group_problems(group: Group, method: Any) -> Iterator[Problem]:
    models = [reference(entry.get("model")) for _, entry in group.entries]
    base = reference(group.base)
    if None in models or (group.base is not None and base is None):
        return
    seen: set[ModelReference | None] = set()
    for model, (path, _) in zip(models, group.entries, strict=True):
        if model in seen:
            yield Problem(path, f"{model} is listed twice; give it once")
        seen.add(model)
    ids = list(dict.fromkeys(models))
    if base is not None and base not in ids and not group.sliced:
        ids.append(base)
    if base is not None and base not in ids:
        ranges = "«sources» of a slice are merged as they are listed"
        yield Problem(group.path, f"the base model {base} is missing: {ranges}; list it too")
        return
    where, reason = _refusal(method, ids, base)
    if reason:
        yield Problem(where or group.path, reason)


def _refusal(method: Any, ids: list[Any], base: ModelReference | None) -> tuple[str, str]:
    """Return where and why the method refuses a group; the weights are looked at later."""
    found = {m.spec.name: m.spec for m in merge_methods.registered_methods()}.get(str(method))
    if found is None:
        return "", ""
    needs_base = methods.is_known(found.name) or found.contract.base == BasePolicy.REQUIRED
    if needs_base and base is None:
        return (
            "base_model",
            f"missing; {found.name} needs the model that the others were tuned from",
        )
    if methods.is_known(found.name) and len(ids) < 2:
        return "", "at least one model besides the base model is needed"
    try:
        found.contract.validate_ids(ids, base)
    except ValueError as error:
        return "", str(error)
    return "", ""


def _range_problems(group: Group) -> Iterator[Problem]:
    lengths: set[int] = set()
    for path, entry in group.entries:
        match entry.get("layer_range"):
            case [int(first), int(end)] if 0 <= first < end:
                lengths.add(end - first)
            case value:
                message = f"expected [first, end) as two whole numbers; got {short_repr(value)}"
                yield Problem(join_path(path, "layer_range"), message)
    if len(lengths) > 1:
        counts = " and ".join(map(str, sorted(lengths)))
        yield Problem(group.path, f"all sources of a slice need as many layers; got {counts}")
