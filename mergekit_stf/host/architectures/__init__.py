"""Architecture tables that the host lacks or has wrong, registered with it.

The JSON files beside this module are in the host's own format; ``tests/host/tables.py`` writes
them from the classes of transformers. Every merge method of the host profits from them.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from mergekit.architecture import ModelArchitecture, ModuleDefinition, WeightInfo
from mergekit.architecture.json_definitions import (
    JSON_ARCHITECTURES,
    NAME_TO_ARCH,
    JsonModuleArchitecture,
    _load_architecture_json,
)

from mergekit_stf.host.exact import ExactArchitecture

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


@cache
def register() -> None:
    """Put our tables into the host's, once."""
    for file in resources.files(__package__).iterdir():
        if file.name.endswith(".json"):
            _put(_load_architecture_json(file.read_text(encoding="utf-8")))
    for name in BIASED:
        for table in list(NAME_TO_ARCH[name]):
            _put(_with_biases(table))
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


def _with_biases(table: ModelArchitecture) -> ModelArchitecture:
    """Return a table of the host with an optional bias beside every projection of its layers."""
    modules = {}
    for key, module in table.modules.items():
        definition = module.architecture.definition
        layers = definition.layer_templates
        weights = [twin for weight in layers.weights for twin in _twins(weight, layers.weights)]
        layers = layers.model_copy(update={"weights": weights})
        definition = definition.model_copy(update={"layer_templates": layers})
        architecture = JsonModuleArchitecture(definition=definition)
        modules[key] = module.model_copy(update={"architecture": architecture})
    copy: ModelArchitecture = table.model_copy(update={"modules": modules})
    return copy


def _twins(weight: WeightInfo, known: list[WeightInfo]) -> list[WeightInfo]:
    bias = weight.name.removesuffix(".weight") + ".bias"
    if not weight.name.endswith("_proj.weight") or any(other.name == bias for other in known):
        return [weight]
    return [weight, WeightInfo(name=bias, optional=True)]
