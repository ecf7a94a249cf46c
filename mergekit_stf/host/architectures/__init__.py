"""Architecture tables that the host lacks or has wrong, registered with it.

The JSON files beside this module are in the host's own format; ``tests/host/tables.py`` writes
them from the classes of transformers. Every merge method of the host profits from them, unless
``MERGEKIT_STF_TABLES=0`` keeps them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import resources

from mergekit.architecture import ModelArchitecture, ModuleDefinition, WeightInfo

from mergekit_stf.host.architectures.exact import ExactArchitecture
from mergekit_stf.host.architectures.fitted import FittedArchitecture
from mergekit_stf.host.compat import (
    JSON_ARCHITECTURES,
    NAME_TO_ARCH,
    load_architecture_json,
)

SWITCH = "MERGEKIT_STF_TABLES"
"""Environment variable: set to 0, the host keeps its own tables and gets none of ours."""

BIASED = (
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "Cohere2ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "Olmo2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Classes whose projections have biases if the configuration says so; the host's tables do not."""

BUFFERED = (
    "BertForMultipleChoice",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
)
"""Classes whose table in the host asks for a buffer that only some of the checkpoints have."""

EXACT = (
    "ASTForAudioClassification",
    "BeitForImageClassification",
    "BeitModel",
    "BertForNextSentencePrediction",
    "CLIPForImageClassification",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "ConvNextForImageClassification",
    "ConvNextV2ForImageClassification",
    "DeepseekV3ForCausalLM",
    "DeiTModel",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "Ernie4_5_MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HubertModel",
    "InternVLForConditionalGeneration",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "ResNetForImageClassification",
    "SiglipForImageClassification",
    "SiglipModel",
    "SiglipTextModel",
    "SiglipVisionModel",
    "StableLmForCausalLM",
    "Wav2Vec2ForSequenceClassification",
)
"""Classes that no table fits, because layers differ, and classes that the host takes for others."""


def switched_on() -> bool:
    """Say whether our tables are wanted: the environment says so unless it says ``0``."""
    return os.environ.get(SWITCH) != "0"


def register_tables() -> None:
    """Put our tables into the host's, once, unless they are switched off."""
    if switched_on():
        _register_once()


@cache
def _register_once() -> None:
    for file in resources.files(__package__).iterdir():
        if file.name.endswith(".json"):
            table = load_architecture_json(file.read_text(encoding="utf-8"))
            _put(_rewrite(table, _keep))
    for name in BIASED:
        for table in list(NAME_TO_ARCH[name]):
            _put(_rewrite(table, _with_biases))
    for name in BUFFERED:
        for table in list(NAME_TO_ARCH[name]):
            _put(_rewrite(table, _without_buffers))
    for name in EXACT:
        module = ModuleDefinition(architecture=ExactArchitecture())
        _put(ModelArchitecture(modules={"default": module}, architectures=[name], model_type=""))


def _put(table: ModelArchitecture) -> None:
    """Add a table, in place of the host's for the same class and type of model."""
    JSON_ARCHITECTURES.append(table)
    for name in table.architectures:
        others = NAME_TO_ARCH.get(name, [])
        kind = table.expected_model_type
        kept = [other for other in others if kind and other.expected_model_type != kind]
        NAME_TO_ARCH[name] = [*kept, table]


def _rewrite(
    table: ModelArchitecture, change: Callable[[list[WeightInfo]], list[WeightInfo]]
) -> ModelArchitecture:
    """Return a table with each list of weights changed, fitted to the model that is asked for."""
    modules = {}
    for key, module in table.modules.items():
        old = module.architecture.definition
        layers = old.layer_templates.model_copy(
            update={"weights": change(old.layer_templates.weights)}
        )
        new = {"pre_weights": change(old.pre_weights), "layer_templates": layers}
        definition = old.model_copy(update=new)
        architecture = FittedArchitecture(definition=definition)
        modules[key] = module.model_copy(update={"architecture": architecture})
    copy: ModelArchitecture = table.model_copy(update={"modules": modules})
    return copy


def _keep(weights: list[WeightInfo]) -> list[WeightInfo]:
    return weights


def _with_biases(weights: list[WeightInfo]) -> list[WeightInfo]:
    """Add an optional bias beside every projection that has none."""
    names = {weight.name for weight in weights}
    added = []
    for weight in weights:
        added.append(weight)
        bias = weight.name.removesuffix(".weight") + ".bias"
        if weight.name.endswith("_proj.weight") and bias not in names:
            added.append(WeightInfo(name=bias, optional=True))
    return added


def _without_buffers(weights: list[WeightInfo]) -> list[WeightInfo]:
    """Leave out the numbers 0, 1, 2, ... that old versions of transformers stored."""
    return [weight for weight in weights if not weight.name.endswith(".position_ids")]
