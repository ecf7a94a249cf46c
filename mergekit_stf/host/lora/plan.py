"""Which weight of the base each adapter changes, and how, planned by the host's own planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.host.adapters.placing import module_name, place_adapter, use_stored_names
from mergekit_stf.host.adapters.read import Adapter, Update, read_adapter
from mergekit_stf.host.architectures.coverage import suspend_guard
from mergekit_stf.host.architectures.loading import ParameterNames, hollow_model
from mergekit_stf.host.checkpoints.inputs import input_models, locate
from mergekit_stf.host.compat import close_checkpoints, no_init_weights
from mergekit_stf.host.lora.recipe import adapter_paths, base_of, replace_adapters
from mergekit_stf.host.planning.planned import PlannedWeight, plan_weights


@dataclass(frozen=True)
class Change:
    """What one adapter does to one weight; where both are set, the differences add up.

    Attributes:
        source: the adapter.
        factors: a low-rank update in the orientation of the stored weight.
        replaced: a tensor that takes the weight's place.
    """

    source: str
    factors: LowRank | None
    replaced: Tensor | None


@dataclass(frozen=True)
class TouchedWeight:
    """A weight that at least one adapter changes.

    Attributes:
        planned: its rule and parameters.
        name: its name in the model; transformers renames weights of some checkpoints.
        transposed: PEFT's ``B A`` is the transposed weight (Conv1D of GPT-2, embeddings).
        embedding: PEFT stores its factors as ``lora_embedding_A`` and ``lora_embedding_B``.
        changes: one for each adapter in the order of the recipe, None where it has none.
    """

    planned: PlannedWeight
    name: str
    transposed: bool
    embedding: bool
    changes: tuple[Change | None, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """A merge of adapters, before any weight of the base has been read.

    Attributes:
        base: the base model, at its local path.
        adapters: the adapters in the order of the recipe.
        planned: every weight that the host would merge, by its name in the base checkpoint.
        touched: those that an adapter changes.
    """

    base: ModelReference
    adapters: tuple[Adapter, ...]
    planned: dict[str, PlannedWeight]
    touched: dict[str, TouchedWeight]


def plan_adapters(config: MergeConfiguration, options: MergeOptions) -> AdapterPlan:
    """Read the adapters of a recipe and match them with the weights of its base.

    Raises:
        STFError: the recipe is not one of adapters of one base, an adapter cannot be read, or it
            changes a weight that the base has not.
    """
    cache = options.transformers_cache
    adapters = tuple(read_adapter(path, cache) for path in adapter_paths(config))
    input_models(config, options)
    local = replace_adapters(config, str(locate(base_of(config).model, cache)))
    close_checkpoints()
    base = base_of(local)
    with suspend_guard():
        planned = _stored_names(plan_weights(local, options), base)
    names = {name: stored for stored, weight in planned.items() for name in _names(weight)}
    model = hollow_model(base.config(options.trust_remote_code))
    loader = None if model is None else ParameterNames(model)
    placed = [place_adapter(adapter, planned, names, loader, base) for adapter in adapters]
    modules = {names[n]: module_name(n, names[n], loader) for a in placed for n in a.weights}
    adapters = tuple(use_stored_names(adapter, names) for adapter in placed)
    conv1d = lru_cache(lambda: _conv1d_modules(base, options.trust_remote_code))
    touched = {
        stored: _find_touched(planned[stored], stored, module, adapters, conv1d)
        for stored, module in modules.items()
    }
    return AdapterPlan(base, adapters, planned, touched)


def _stored_names(planned: list[PlannedWeight], base: ModelReference) -> dict[str, PlannedWeight]:
    """Map the names in the base's checkpoint to planned weights; a tie has no name of its own."""
    stored = LoaderCache().get(base).index.tensor_paths
    found: dict[str, PlannedWeight] = {}
    for weight in planned:
        name = next((name for name in _names(weight) if name in stored), None)
        if name is not None:
            found[name] = weight
    return found


def _names(weight: PlannedWeight) -> tuple[str, ...]:
    return (weight.name, *(weight.loads[weight.base].aliases or ()))


def _find_touched(
    weight: PlannedWeight,
    stored: str,
    module: str,
    adapters: tuple[Adapter, ...],
    conv1d: Callable[[], frozenset[str]],
) -> TouchedWeight:
    updates = [a.updates[stored] for a in adapters if stored in a.updates]
    embedding = any(update.embedding for update in updates)
    transposed = any(_is_transposed(update, module, weight, conv1d) for update in updates)
    changes = tuple(
        _change(adapter, stored, weight, transposed) if stored in adapter.weights else None
        for adapter in adapters
    )
    return TouchedWeight(weight, module, transposed, embedding, changes)


def _change(adapter: Adapter, name: str, weight: PlannedWeight, transposed: bool) -> Change:
    shape = weight.header.shape
    update, replaced = adapter.updates.get(name), adapter.replaced.get(name)
    factors = None
    if update is not None:
        factors = update.factors.transposed if transposed else update.factors
    for found in (factors, replaced):
        if found is not None and tuple(found.shape) != shape:
            raise STFError(
                f"{adapter.source}: {name} is {tuple(found.shape)}, the base's is {shape}; "
                "the adapter belongs to another base, or its vocabulary was resized"
            )
    return Change(adapter.source, factors, replaced)


def _is_transposed(
    update: Update, name: str, weight: PlannedWeight, conv1d: Callable[[], frozenset[str]]
) -> bool:
    if update.embedding:
        return True
    rows, columns = update.factors.shape
    if rows != columns:
        return weight.header.shape == (columns, rows)
    return name.rpartition(".")[0] in conv1d()


def _conv1d_modules(base: ModelReference, trust_remote_code: bool) -> frozenset[str]:
    """Name the modules that store their weight as (in, out), which a square one does not show."""
    config = base.config(trust_remote_code)
    with torch.device("meta"), no_init_weights():
        model = get_auto_cls(config.architectures[0]).from_config(
            config, trust_remote_code=trust_remote_code
        )
    return frozenset(name for name, m in model.named_modules() if isinstance(m, Conv1D))
