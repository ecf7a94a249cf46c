"""What transformers makes of the names in a checkpoint when it loads them.

A checkpoint and a model may name the same weight differently: transformers renames, fuses and
splits while it loads. Two names mean the same weight when they end in the same parameter.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_stf.host.compat import (
    WeightConverter,
    WeightRenaming,
    computed_parameters,
    get_model_conversion_mapping,
    no_init_weights,
    rename_source_key,
)

TURNED = ("Llama4TextExperts",)
"""Classes of experts that store their weights as (in, out) and have no mark that says so."""


class ParameterNames:
    """The way from a checkpoint's names to the parameters of one model.

    Attributes:
        ties: for each tied parameter the one that holds the weight.
        embedding: the parameter of the input embedding, None where the class names none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self._trained = {name for name, _ in model.named_parameters()}
        self._computed = [re.compile(p) for p in computed_parameters(model)]
        self.ties: dict[str, str] = dict(model.all_tied_weights_keys)
        self.embedding = _embedding_of(model)
        self._turned = _stored_as_inputs_by_outputs(model)

    def of(self, name: str) -> set[str]:
        """Return the parameters that a stored tensor fills, none if the model has no use for it.

        Of tied parameters the one that holds the weight is returned.
        """
        target, pattern = self._found(name)
        if target is None:
            return set()
        return {self.ties.get(name, name) for name in self._targets(target, pattern)}

    def __contains__(self, name: str) -> bool:
        """Say whether the model has a parameter of that name, tied ones included."""
        return name in self._parameters

    def parameter(self, name: str) -> str | None:
        """Return the parameter of a stored tensor, a tied copy too; None if it has no use."""
        return self._found(name)[0]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the parameter that a stored tensor fills as it is.

        None where it fills none, or where transformers fuses, splits or turns it on loading.
        """
        target, pattern = self._found(name)
        if target is None or pattern is not None:
            return None
        return tuple(self._parameters[target].shape)

    def input_axis(self, name: str) -> int:
        """Return the axis of a stored matrix, or of each of a stack, that meets the inputs.

        It is 1, the columns, but for layers that store their weight as (in, out).
        """
        return 0 if self._found(name)[0] in self._turned else 1

    def fills_parameter(self, name: str) -> bool:
        """Say whether a stored tensor fills a parameter, and not a buffer or nothing at all."""
        return not self._trained.isdisjoint(self.of(name))

    def parameters_to_fill(self) -> set[str]:
        """Return the parameters that a checkpoint must fill.

        Buffers, tied copies and what the class computes itself are none of them.
        """
        own = self._trained - self.ties.keys()
        return {name for name in own if not any(p.search(name) for p in self._computed)}

    def stored_parameters(self) -> list[str]:
        """Return the parameters that a checkpoint holds: all but tied copies."""
        return [name for name in self._parameters if name not in self.ties]

    def tied_to(self, parameter: str) -> list[str]:
        """Return the parameters that share the storage of this one."""
        return [copy for copy, source in self.ties.items() if source == parameter]

    def _found(self, name: str) -> tuple[str | None, str | None]:
        """Return the parameter of a stored tensor, and the pattern of the conversion if any."""
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            target, pattern = rename_source_key(
                name, renamings, converters, self._prefix, self._parameters
            )
            if target in self._parameters:
                return target, pattern
        return None, None

    def _targets(self, target: str, pattern: str | None) -> list[str]:
        """Return every parameter of a conversion, of which transformers names the first."""
        for converter in self._converters:
            if pattern in converter.source_patterns:
                first, *others = converter.target_patterns
                return [target, *(target.replace(first, other, 1) for other in others)]
        return [target]


def _stored_as_inputs_by_outputs(model: PreTrainedModel) -> frozenset[str]:
    """Return the weights of GPT-2's Conv1D, and of experts that are multiplied from the right."""
    found = []
    for name, module in model.named_modules():
        turned = getattr(module, "is_transposed", False) or type(module).__name__ in TURNED
        if turned or isinstance(module, Conv1D):
            found += [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]
    return frozenset(found)


def _embedding_of(model: PreTrainedModel) -> str | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers' answer for models without one input embedding
        return None
    return next((name for name, p in model.named_parameters() if p is weight), None)


@dataclass(frozen=True)
class HashableConfig:
    """A configuration that compares by its text, for caches."""

    text: str
    config: PretrainedConfig = field(compare=False)


def parameter_names(config: PretrainedConfig) -> ParameterNames | None:
    """Return the names of the model that a configuration describes, None as `hollow_model`."""
    return _parameter_names(HashableConfig(config.to_json_string(), config))


@lru_cache(maxsize=4)
def _parameter_names(settings: HashableConfig) -> ParameterNames | None:
    model = hollow_model(settings.config)
    return None if model is None else ParameterNames(model)


def hollow_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """Build the model that a configuration describes, without memory for its weights.

    ``None`` where transformers has no class of that name, as for models with code of their own.
    """
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is None:
        return None
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(copy.deepcopy(config))
    return model
