"""Tables of architectures that come from the model's class, for one configuration at a time.

The host's tables say one thing for all layers and all configurations. Models whose layers differ
(dense and sparse, attention and state space) or stand in several stacks fit none. For these the
model is built without memory from its own configuration, and its parameters are the table.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import lru_cache

from mergekit.architecture import ModuleArchitecture, WeightInfo
from mergekit.architecture.auto import infer_vocabulary_axes
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_stf.core.errors import STFError
from mergekit_stf.host import compat
from mergekit_stf.host.architectures.loading import HashableConfig, ParameterNames, hollow_model


class ExactArchitecture(ModuleArchitecture):
    """All weights of a class of transformers, as its configuration makes them."""

    def name(self) -> str:
        """Return the name by which the host lists this architecture."""
        return "exact"

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the weights outside of the main stack of layers."""
        return _split(config)[0]

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the weights of one layer of the main stack."""
        return _split(config)[1][index]

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return nothing: every weight comes before or within the layers."""
        return []

    def num_layers(self, config: PretrainedConfig) -> int:
        """Return the length of the main stack."""
        return len(_split(config)[1])


def weights_of(model: PreTrainedModel) -> list[WeightInfo]:
    """Return what a checkpoint of a model holds, in the layout in which it is stored.

    A weight that transformers only renames gets its stored name, and the parameter's own as an
    alias; one that transformers fuses on loading gets the parameter's name, for the host fuses too.
    """
    names = ParameterNames(model)
    spellings = _spellings(model, names)
    axes = _vocabulary_axes(model)
    infos = []
    for parameter in names.stored_parameters():
        first, *others = _with_prefix([*spellings[parameter], parameter], model)
        infos.append(
            WeightInfo(
                name=first,
                aliases=tuple(others) or None,
                vocabulary_axis=axes.get(parameter),
                tied_names=tuple(names.tied_to(parameter)) or None,
            )
        )
    return list({info.name: info for info in infos}.values())


def without_ties(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration in which no weight is said to be another one's copy."""
    untied = copy.deepcopy(config)
    for part in (untied, getattr(untied, "text_config", untied)):
        part.tie_word_embeddings = False
    return untied


def _tied_names(weights: list[WeightInfo], config: PretrainedConfig) -> list[WeightInfo]:
    """Return the weights that the model ties to one of these, which a checkpoint may hold too.

    Where it holds both, with values of their own, transformers does not tie them.
    """
    sources = {name: weight for weight in weights for name in weight.tied_names or ()}
    model = hollow_model(without_ties(config)) if sources else None
    found = []
    for weight in weights_of(model) if model else []:
        names = [weight.name, *(weight.aliases or ())]
        for source in [sources[name] for name in names if name in sources][:1]:
            change = {"optional": True, "aliases": None, "tied_names": (source.name,)}
            axis = {"vocabulary_axis": source.vocabulary_axis}
            found.append(weight.model_copy(update=change | axis))
    return found


def _spellings(model: PreTrainedModel, names: ParameterNames) -> dict[str, list[str]]:
    """Return the stored names of each parameter that has one of its own or a share in one."""
    spellings: dict[str, list[str]] = {parameter: [] for parameter in names.stored_parameters()}
    conversions = compat.get_model_conversion_mapping(model, add_legacy=False)
    plain = [c for c in conversions if not isinstance(c, compat.PrefixChange)]
    for transforms in (plain, conversions):
        stored = compat.stored_state(model, transforms, spellings)
        filled = {name: names.of(name) for name in stored}
        shares = Counter(parameter for targets in filled.values() for parameter in targets)
        for name, targets in filled.items():
            for parameter in targets:
                if shares[parameter] == 1:
                    spellings[parameter].append(name)
    return spellings


def _with_prefix(names: list[str], model: PreTrainedModel) -> list[str]:
    """Add the spellings of the bare model for a model with a head, and the other way round."""
    prefix = f"{model.base_model_prefix}."
    if type(model).__name__.endswith("Model"):
        others = [prefix + name for name in names]
    else:
        others = [name.removeprefix(prefix) for name in names]
    return list(dict.fromkeys([*names, *others]))


def _vocabulary_axes(model: PreTrainedModel) -> dict[str, int]:
    try:
        axes: dict[str, int] = infer_vocabulary_axes(model)
    except NotImplementedError:  # transformers' answer for models without one input embedding
        return {}
    return axes


def _split(config: PretrainedConfig) -> tuple[list[WeightInfo], list[list[WeightInfo]]]:
    return _split_cached(HashableConfig(config.to_json_string(), config))


@lru_cache(maxsize=64)
def _split_cached(settings: HashableConfig) -> tuple[list[WeightInfo], list[list[WeightInfo]]]:
    """Return the weights outside of the longest stack of layers, and those of its layers."""
    model = hollow_model(settings.config)
    if model is None:
        raise STFError(f"transformers has no class {settings.config.architectures[0]}")
    weights = weights_of(model)
    weights += _tied_names(weights, settings.config)
    stacks = Counter(prefix for prefix, _ in map(_layer, weights) if prefix is not None)
    (main, _), *_ = stacks.most_common(1) or [("", 0)]
    layers: dict[int, list[WeightInfo]] = {}
    outside: list[WeightInfo] = []
    for weight in weights:
        prefix, index = _layer(weight)
        (layers.setdefault(index, []) if prefix == main else outside).append(weight)
    return outside, [layers[index] for index in sorted(layers)]


def _layer(weight: WeightInfo) -> tuple[str | None, int]:
    match = re.search(r"\.(\d+)\.", weight.name)
    return (weight.name[: match.start()], int(match.group(1))) if match else (None, 0)
