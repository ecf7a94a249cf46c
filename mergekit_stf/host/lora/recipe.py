"""Recipes whose models are adapters of one base: what they may say, and how the host plans them."""

from __future__ import annotations

from mergekit.common import ModelPath, ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.config import FULL_ROUTE


def adapter_paths(config: MergeConfiguration) -> list[ModelPath]:
    """Return the adapters of a recipe in its order.

    Raises:
        STFError: the recipe is not a method of ours over ``models:`` that are all
            ``base+adapter`` with the ``base_model`` as their base, or it changes the vocabulary.
    """
    if not methods.is_known(config.merge_method):
        raise STFError(
            f"merge_method {config.merge_method!r}: adapters are merged by the methods "
            f"{', '.join(methods.names())} only"
        )
    if config.models is None:
        raise STFError(f"slices and modules cannot be used with adapters' factors; {FULL_ROUTE}")
    if config.tokenizer is not None or config.tokenizer_source not in (None, "base"):
        raise STFError(f"adapters bring no tokenizer: remove tokenizer_source, or {FULL_ROUTE}")
    if config.chat_template is not None:
        raise STFError("chat_template: the base's is copied; change it in the output's tokenizer")
    base = base_of(config)
    return [_adapter(item.model, base) for item in config.models if item.model != base]


def base_of(config: MergeConfiguration) -> ModelReference:
    """Return the base model of a recipe.

    Raises:
        STFError: it has none, or one with an adapter.
    """
    if config.base_model is None or config.base_model.lora is not None:
        raise STFError(f"base_model must be a model without an adapter, got {config.base_model}")
    return config.base_model


def replace_adapters(config: MergeConfiguration, folder: str) -> MergeConfiguration:
    """Return the recipe with every adapter replaced by its base, which has the same weights' names.

    The host tells models apart by their paths, so each adapter gets another spelling of the
    base's directory; nothing is merged and nothing is copied to plan the recipe.

    Args:
        config: a recipe that ``adapter_paths`` accepts.
        folder: the directory of the base.
    """
    base = base_of(config)
    models = [
        InputModelDefinition(
            model=_spelling(folder, 0 if item.model == base else number), parameters=item.parameters
        )
        for number, item in enumerate(config.models or (), start=1)
    ]
    return config.model_copy(update={"base_model": _spelling(folder, 0), "models": models})


def _spelling(folder: str, number: int) -> ModelReference:
    return ModelReference(model=ModelPath(path=folder + "/." * number))


def _adapter(model: ModelReference, base: ModelReference) -> ModelPath:
    if model.lora is None:
        raise STFError(f"{model} is a full model, not «base+adapter»; {FULL_ROUTE}")
    if model.model != base.model:
        raise STFError(f"{model}: its base is not base_model {base}; adapters need the same one")
    return model.lora
