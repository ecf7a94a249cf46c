"""Tensors of the base for which its class has no use, and which a merge keeps all the same.

A checkpoint may hold more than the class in transformers reads: layers that predict several tokens
ahead (``mtp.*`` of Qwen3.5, layer ``num_hidden_layers`` of DeepSeek-V3 and GLM-4.5), which other
programs run and the configuration announces, or the head of another task. The host's tables come
from the class and pass over them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
)
from mergekit.architecture.base import ConfiguredModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_stf.host.architectures.loading import parameter_names
from mergekit_stf.host.architectures.names import collapse_layers
from mergekit_stf.host.checkpoints.headers import stored_header

COMPUTED = re.compile(
    r"(^|[._])(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids"
    r"|relative_position_index|num_batches_tracked)$"
)
"""Tables that a class computes by itself and that older versions of transformers stored."""

VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head|head)\.weight$")
"""Embeddings and heads, which need as many rows as the vocabulary has tokens besides."""

LAYER = re.compile(r"^(.*?)\.\d+\.")


@dataclass(frozen=True)
class Unused:
    """The base's tensors that its class does not use.

    Attributes:
        base: the base model, as the recipe writes it.
        model_class: the name of the class.
        merged: those that every model has, which are merged like the rest.
        copied: those that only some models have, or that hold no floating-point numbers.
        dropped: those of a layer whose number the recipe gives to another one.
        vocabulary: those with a row for each token.
    """

    base: str
    model_class: str
    merged: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    vocabulary: frozenset[str] = frozenset()

    def warning(self) -> str | None:
        """Return one line that names the kinds of these tensors and what becomes of them."""
        fates = {
            "merged like the rest": self.merged,
            "copied from the base, because not every model has them to merge": self.copied,
            "left out, because the recipe's slices give their layer's number to another layer": (
                self.dropped
            ),
        }
        parts = [f"{len(n)} are {fate}: {collapse_layers(n)}" for fate, n in fates.items() if n]
        if not parts:
            return None
        return f"{self.base} holds tensors that {self.model_class} does not use; {'; '.join(parts)}"


class WithUnused(ModuleArchitecture):
    """A module of an architecture, and before its weights the tensors that no class uses.

    Args:
        module: the module as the host knows it.
        unused: what the base stores besides.
    """

    def __init__(self, module: ModuleDefinition, unused: Unused) -> None:
        self._module = module
        self._extra = [
            WeightInfo(
                name=name, optional=True, vocabulary_axis=0 if name in unused.vocabulary else None
            )
            for name in (*unused.merged, *unused.copied)
        ]

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the unused tensors and what the module has before its layers."""
        return [*self._extra, *self._configured(config).pre_weights()]

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the module's weights of one layer."""
        weights: list[WeightInfo] = self._configured(config).layer_weights(index)
        return weights

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return what the module has after its layers."""
        weights: list[WeightInfo] = self._configured(config).post_weights()
        return weights

    def num_layers_config_key(self) -> str:
        """Return the module's own answer."""
        key: str = self._module.architecture.num_layers_config_key()
        return key

    def num_layers(self, config: PretrainedConfig) -> int:
        """Return the module's own answer."""
        count: int = self._module.architecture.num_layers(config)
        return count

    def _configured(self, config: PretrainedConfig) -> ConfiguredModuleArchitecture:
        module = self._module
        return ConfiguredModuleArchitecture(
            info=module.architecture, config=config, weight_prefix=module.weight_prefix
        )


def find_unused(
    architecture: ModelArchitecture, config: MergeConfiguration, options: MergeOptions
) -> Unused:
    """Find the base's tensors that neither the architecture names nor the class reads.

    Nothing is found where transformers has no such class, or the recipe no base.
    """
    base = config.base_model
    if base is None:
        return Unused("", "")
    settings = base.config(options.trust_remote_code)
    loader = parameter_names(settings)
    if loader is None:
        return Unused(str(base), "")
    planned = listed_weights(architecture, settings)
    named = {name for weight in planned for name in (weight.name, *(weight.aliases or ()))}
    rows = getattr(settings.get_text_config(), "vocab_size", None)
    left = LoaderCache().get(base).index.tensor_paths.keys() - named
    names = sorted(n for n in left if not COMPUTED.search(n) and not loader.of(n))
    moved = _moves_layers(architecture, config, settings)
    dropped = set(_find_renumbered(names, planned)) if moved else set()
    merged = [n for n in names if n not in dropped and _mergeable(n, config)]
    return Unused(
        base=str(base),
        model_class=settings.architectures[0],
        merged=tuple(merged),
        copied=tuple(n for n in names if n not in dropped and n not in merged),
        dropped=tuple(sorted(dropped)),
        vocabulary=frozenset(n for n in names if VOCABULARY.search(n) and _has_rows(n, base, rows)),
    )


def add_unused(
    architecture: ModelArchitecture, found: Unused, config: MergeConfiguration
) -> ModelArchitecture:
    """Return the architecture with the unused tensors, and hide from the host what it must copy.

    The host copies a weight of the base that no other model has, and merges what at least one
    has. So the copied tensors leave the index of the other models' open files.
    """
    if not (found.merged or found.copied):
        return architecture
    for model in config.referenced_models():
        if model != config.base_model:
            index = LoaderCache().get(model).index
            for name in found.copied:
                index.tensor_paths.pop(name, None)
    modules = dict(architecture.modules)
    key = next(name for name in modules if not config.modules or name in config.modules)
    update = {"architecture": WithUnused(modules[key], found), "weight_prefix": None}
    modules[key] = modules[key].model_copy(update=update)
    extended: ModelArchitecture = architecture.model_copy(update={"modules": modules})
    return extended


def listed_weights(architecture: ModelArchitecture, settings: PretrainedConfig) -> list[WeightInfo]:
    """Return what the host's planner looks for: the lists that are the same for every input."""
    configured = ConfiguredModelArchitecture(info=architecture, config=settings)
    listed: list[WeightInfo] = []
    for module in map(configured.get_module, architecture.modules):
        listed += module.pre_weights()
        for index in range(module.num_layers()):
            listed += module.layer_weights(index)
        listed += module.post_weights()
    return listed


def _has_rows(name: str, model: ModelReference, rows: int | None) -> bool:
    return stored_header(LoaderCache().get(model), name).shape[0] == rows


def _mergeable(name: str, config: MergeConfiguration) -> bool:
    """Say whether all models store a tensor, as floating-point numbers."""
    loaders = [LoaderCache().get(model) for model in config.referenced_models()]
    return all(
        name in loader.index.tensor_paths and stored_header(loader, name).dtype.is_floating_point
        for loader in loaders
    )


def _find_renumbered(names: Iterable[str], planned: Iterable[WeightInfo]) -> Iterator[str]:
    """Yield the names of tensors that lie in a stack of layers of the class."""
    stacks = {match[1] for weight in planned if (match := LAYER.match(weight.name))}
    return (name for name in names if (match := LAYER.match(name)) and match[1] in stacks)


def _moves_layers(
    architecture: ModelArchitecture, config: MergeConfiguration, settings: PretrainedConfig
) -> bool:
    """Say whether a recipe's slices make a model of another number of layers."""
    slices = {name: module.slices for name, module in (config.modules or {}).items()}
    if config.slices:
        slices = dict.fromkeys(architecture.modules, config.slices)
    for name, parts in slices.items():
        ranges = [part.sources[0].layer_range for part in parts or ()]
        length = sum(end - start for start, end in ranges)
        if ranges and length != architecture.modules[name].architecture.num_layers(settings):
            return True
    return False
