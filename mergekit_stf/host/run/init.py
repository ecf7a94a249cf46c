"""From a base and models to a recipe that has been planned."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import read_text
from mergekit_stf.host.checkpoints.inputs import locate
from mergekit_stf.host.planning.plan import Plan, make_plan
from mergekit_stf.host.recipe.draft import draft
from mergekit_stf.host.recipe.models import path_problem
from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.network import stay_offline

SAMPLE = 24
"""Weights that are read to see whether the models were tuned from the base, as of ``--probe``."""


@dataclass(frozen=True)
class Draft:
    """A recipe that has been planned.

    Attributes:
        text: the recipe, commented.
        plan: what its merge will take.
        adapters: whether all models are adapters.
        warnings: what should be looked at, one line each.
    """

    text: str
    plan: Plan
    adapters: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    reference: str
    adapter: bool
    base: str | None


def draft_recipe(
    base: str,
    models: Sequence[str],
    method: str = methods.RECOMMENDED,
    source: str = "recipe",
    out: Path = Path("merged"),
) -> Draft:
    """Write a recipe for models of one base, and plan it.

    Directories are taken as they are; hub models must be in the cache on this machine, and no hub
    is asked. An adapter is known by its ``adapter_config.json`` and merged as «base+adapter».

    Args:
        base: the directory or the hub name of the base.
        models: directories or hub names of models or adapters.
        method: the name of the merge method.
        source: what messages call the recipe.
        out: where the merge would go.

    Raises:
        STFError: a model is not there, or the models cannot be merged with the base.
    """
    with stay_offline():
        base = _reference(base)
        if (_folder(base) / "adapter_config.json").exists():
            raise STFError(f"{base} is an adapter; give the model that it was trained on as BASE")
        found = [_model(base, _reference(model)) for model in models]
        adapters = any(model.adapter for model in found)
        text = draft(methods.get(method), base, [model.reference for model in found])
        recipe = check_recipe(text, source)
        plan = make_plan(recipe, out, MergeOptions(), 0 if adapters else SAMPLE)
    own = tuple(warning for model in found for warning in _base_warnings(model, base))
    every = all(model.adapter for model in found)
    return Draft(text, plan, every, (*own, *plan.warnings))


def _reference(name: str) -> str:
    """Return a directory as recipes write it: the host asks a hub about a path like ``a/b``."""
    if os.path.isdir(name) and not name.startswith(("/", ".")) and not os.path.isabs(name):
        return f"./{name.rstrip('/')}"
    return name


def _folder(name: str) -> Path:
    problem = path_problem(name)
    if problem:
        raise STFError(problem)
    try:
        return locate(ModelPath(path=name), None)
    except STFError as error:
        raise STFError(
            f"{name} is no directory, and not in the cache of hub models on this machine; "
            f"`hf download {name}` brings it there"
        ) from error


def _model(base: str, name: str) -> _Model:
    settings = _folder(name) / "adapter_config.json"
    if not settings.exists():
        return _Model(name, False, None)
    named = json.loads(read_text(settings)).get("base_model_name_or_path")
    return _Model(f"{base}+{name}", True, named)


def _base_warnings(model: _Model, base: str) -> Iterator[str]:
    """Yield where an adapter says that it was trained on another model."""
    named = model.base
    if named in (None, base) or (os.path.isdir(named) and os.path.samefile(named, _folder(base))):
        return
    yield (
        f"{model.reference.partition('+')[2]} says that it was trained on {named}; "
        f"check that {base} is that model"
    )
