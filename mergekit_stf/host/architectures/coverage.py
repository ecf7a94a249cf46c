"""Weights of the inputs that a merge would not write, found before any work is done.

The host merges the weights that its table of the architecture names and passes over the rest of
a checkpoint in silence. Here the names in the checkpoints are held against the names that will be
written. Only headers are read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.copies import check_copies
from mergekit_stf.host.architectures.all_weights import architecture_of
from mergekit_stf.host.architectures.loading import ParameterNames, hollow_model
from mergekit_stf.host.architectures.names import collapse_layers, kind_of
from mergekit_stf.host.architectures.unused import listed_weights
from mergekit_stf.host.checkpoints.weight_files import weight_files

ALLOW_LOSS = "MERGEKIT_STF_ALLOW_LOSS"
"""Environment variable: set to 1, an incomplete output is a warning and no error."""

LOG = logging.getLogger(__name__)

_guarding = ContextVar("guarding", default=True)


@dataclass(frozen=True)
class Input:
    """A model of the recipe: its configuration, what it stores, what the host plans to read."""

    model: ModelReference
    settings: PretrainedConfig
    stored: set[str]
    planned: list[WeightInfo]


def check_coverage(config: MergeConfiguration, options: MergeOptions) -> list[str]:
    """Refuse a merge whose output would lack weights of its inputs, or whose inputs lack some.

    Layers that ``slices`` leave out are left out on purpose and count as covered; a module that
    a ``modules`` recipe does not name is not.

    Returns:
        What becomes of tensors for which the base's class has no use, if there are any.

    Raises:
        STFError: with the model, the names of the weights and the ways out.
    """
    architecture, unused = architecture_of(config, options)
    inputs = _read(config, options, architecture)
    for model, names in absent_weights(inputs).items():
        raise STFError(
            f"{model}: {len(names)} weights that the merge needs are not in the checkpoint: "
            f"{collapse_layers(names)}. Models of one architecture and size can be merged; save "
            "this one again with transformers, or leave it out."
        )
    lost = lost_weights(inputs)
    if lost:
        _report(lost)
    return [line] if (line := unused.warning()) else []


def lost_weights(inputs: Sequence[Input]) -> dict[ModelReference, list[str]]:
    """Return the stored weights that an input needs and the output would lack, the base first."""
    lost = {}
    for one in inputs:
        written = [w for w in one.planned if not w.optional or _owners(w, inputs)]
        if left := one.stored - {name for w in written for name in _names(w)}:
            lost[one.model] = _needed_names(left, [w.name for w in written], one.settings)
    return {model: names for model, names in lost.items() if names}


def absent_weights(inputs: Sequence[Input]) -> dict[ModelReference, list[str]]:
    """Return the weights that the host would look for in vain, which stops it in mid-merge.

    An optional weight is one of them if another input has it and makes use of it.
    """
    absent = {}
    for one in inputs:
        kinds: dict[str, list[WeightInfo]] = {}
        for weight in one.planned:
            if one.stored.isdisjoint([*_names(weight), *(weight.tied_names or ())]):
                kinds.setdefault(kind_of(weight.name), []).append(weight)
        # The answer is the same in every layer, and slow to find out.
        unfound = [kind for kind in kinds.values() if _unfound(kind[0], one, inputs)]
        absent[one.model] = [weight.name for kind in unfound for weight in kind]
    return {model: names for model, names in absent.items() if names}


def guard_planning(
    method: str, input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None
) -> None:
    """Check the coverage from within the host, which calls ``validate_inputs`` while it plans.

    The host validates each slice of the output (``default.slices[0]``) before it loads a weight,
    then each weight by its name; only the calls for slices do work here.

    Raises:
        STFError: as `check_coverage` and `weight_files`.
    """
    if not _guarding.get():
        return
    planning = re.fullmatch(r".+\.slices\[\d+\]", group_name or "") is not None
    models = [model for model in input_ids if isinstance(model, ModelReference)]
    if not planning or not isinstance(base_id, ModelReference) or len(models) < len(input_ids):
        return
    for model in models:
        weight_files(Path(LoaderCache().get(model).index.base_path))
    # The host has refused or allowed mixed architectures by now.
    recipe, options = recipe_of_group(method, base_id, models, allow_crimes=True)
    check_copies(models, options)
    check_coverage(recipe, options)


def recipe_of_group(
    method: str, base: ModelReference, models: Sequence[ModelReference], allow_crimes: bool = False
) -> tuple[MergeConfiguration, MergeOptions]:
    """Return a recipe of the models that the host merges, and its options as its loaders have them.

    Args:
        method: the name of the merge method.
        base: the base model.
        models: the models of one weight; the base may be among them.
        allow_crimes: allow mixed architectures.
    """
    cache = LoaderCache()
    options = MergeOptions(
        transformers_cache=cache.hf_cache_dir,
        lora_merge_cache=cache.lora_cache_dir,
        lora_merge_dtype=cache.lora_merge_dtype,
        lazy_unpickle=cache.lazy_unpickle,
        trust_remote_code=cache.trust_remote_code,
        allow_crimes=allow_crimes,
    )
    named = [InputModelDefinition(model=model) for model in models]
    return MergeConfiguration(merge_method=method, base_model=base, models=named), options


@contextmanager
def suspend_guard() -> Iterator[None]:
    """Let the host plan without the guard.

    For a merge that writes what the host's table does not name, or whose coverage is checked.
    """
    token = _guarding.set(False)
    try:
        yield
    finally:
        _guarding.reset(token)


def _read(
    config: MergeConfiguration, options: MergeOptions, architecture: ModelArchitecture
) -> list[Input]:
    """Read configurations and headers of all inputs, the base first."""
    chosen = {name: architecture.modules[name] for name in config.modules or architecture.modules}
    partial = architecture.model_copy(update={"modules": chosen})
    inputs = []
    for model in sorted(config.referenced_models(), key=lambda m: (m != config.base_model, str(m))):
        settings = model.config(trust_remote_code=options.trust_remote_code)
        stored = set(LoaderCache().get(model).index.tensor_paths)
        inputs.append(Input(model, settings, stored, listed_weights(partial, settings)))
    return inputs


def _names(weight: WeightInfo) -> list[str]:
    return [weight.name, *(weight.aliases or ())]


def _owners(weight: WeightInfo, inputs: Sequence[Input]) -> list[Input]:
    """Return the inputs with a weight, as the host's planner finds it: it does not look at ties."""
    return [one for one in inputs if not one.stored.isdisjoint(_names(weight))]


def _unfound(weight: WeightInfo, one: Input, inputs: Sequence[Input]) -> bool:
    """Say whether the merge needs a weight that an input does not store, not even in parts."""
    names = _names(weight)
    if any(can_convert_checkpoint_keys(one.settings.model_type, one.stored, n) for n in names):
        return False
    owners = _owners(weight, inputs)
    return not weight.optional or any(_needed_names({weight.name}, [], o.settings) for o in owners)


def _needed_names(left: set[str], written: Iterable[str], settings: PretrainedConfig) -> list[str]:
    """Return the names for whose parameters nothing is written."""
    model = hollow_model(settings)
    if model is None:
        return sorted(left)
    loader = ParameterNames(model)
    filled = {parameter for name in written for parameter in loader.of(name)}
    return sorted(name for name in left if loader.of(name) - filled)


def _report(lost: dict[ModelReference, list[str]]) -> None:
    (model, names), *others = lost.items()
    message = (
        f"{model}: {len(names)} weights would be missing from the merged model, because mergekit's "
        f"table of this architecture does not name them: {collapse_layers(names)}"
        f"{f' (and weights of {len(others)} more inputs)' if others else ''}. Merge with "
        "mergekit-pytorch, which goes by the names in the files, or set "
        f"{ALLOW_LOSS}=1 to do without them."
    )
    if os.environ.get(ALLOW_LOSS) != "1":
        raise STFError(message)
    LOG.warning(message)
