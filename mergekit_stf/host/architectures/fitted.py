"""The host's kind of table, with an answer of its own to what one model holds.

A table lists a weight that some models of its class have, such as a bias, as optional. The planner
of a merge needs that: it pairs the weights of all models by their places in the list. A tool that
looks at one model needs to know which of them that model has: ``mergekit-extract-lora`` subtracts
the biases of two models wherever a table names one.
"""

from __future__ import annotations

import logging
from functools import lru_cache

from mergekit.architecture import WeightInfo
from mergekit.architecture.json_definitions import JsonModuleArchitecture
from transformers import PretrainedConfig

from mergekit_stf.host.architectures.loading import HashableConfig, ParameterNames, hollow_model

LOG = logging.getLogger(__name__)


class FittedArchitecture(JsonModuleArchitecture):
    """A table whose list for one model leaves out the optional weights that its class has not."""

    def all_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the weights of a model of this configuration.

        The lists by layer, from which merges are planned, are the same for all configurations.
        """
        names = _names(HashableConfig(config.to_json_string(), config))
        listed: list[WeightInfo] = super().all_weights(config)
        if names is None:
            return listed
        return [weight for weight in listed if not weight.optional or names.of(weight.name)]


@lru_cache(maxsize=64)
def _names(settings: HashableConfig) -> ParameterNames | None:
    """Return the names of a model's parameters, None where transformers cannot build the model."""
    try:
        model = hollow_model(settings.config)
    except Exception as error:  # the tool that asks may not need the model, so it is not stopped
        found = f"{type(error).__name__}: {error}"
        LOG.warning("transformers cannot build this model, so all its weights count: %s", found)
        return None
    return model and ParameterNames(model)
