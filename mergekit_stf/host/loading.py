"""What transformers makes of the names in a checkpoint when it loads them.

A checkpoint and a model may name the same weight differently: transformers renames, fuses and
splits while it loads. Two names mean the same weight when they end in the same parameter.
"""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights


class ParameterNames:
    """The way from a checkpoint's names to the parameters of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self._tied = dict(model.all_tied_weights_keys)

    def of(self, name: str) -> set[str]:
        """Return the parameters that a stored tensor fills, none if the model has no use for it.

        Of tied parameters the one that holds the weight is returned.
        """
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            target, pattern = rename_source_key(
                name, renamings, converters, self._prefix, self._parameters
            )
            if target in self._parameters:
                return {self._tied.get(name, name) for name in self._targets(target, pattern)}
        return set()

    def __contains__(self, name: str) -> bool:
        """Say whether the model has a parameter of that name, tied ones included."""
        return name in self._parameters

    def stored(self) -> list[str]:
        """Return the parameters that a checkpoint holds: all but tied copies."""
        return [name for name in self._parameters if name not in self._tied]

    def tied_to(self, parameter: str) -> list[str]:
        """Return the parameters that share the storage of this one."""
        return [copy for copy, source in self._tied.items() if source == parameter]

    def _targets(self, target: str, pattern: str | None) -> list[str]:
        """Return every parameter of a conversion, of which transformers names the first."""
        for converter in self._converters:
            if pattern in converter.source_patterns:
                first, *others = converter.target_patterns
                return [target, *(target.replace(first, other, 1) for other in others)]
        return [target]


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
