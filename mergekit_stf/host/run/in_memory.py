"""Merges of weights that are in memory, by any merge method that mergekit knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit import merge_methods
from torch import Tensor

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.plugin.method import register_with_mergekit
from mergekit_stf.host.recipe.keys import did_you_mean

BASE = "base_model"
"""What messages call the base."""

Weights = Mapping[str, Tensor] | torch.nn.Module
"""The weights of a model by name, as a state dictionary, or a module that has them."""


def merge_weights(
    base: Weights,
    models: Mapping[str, Weights] | Sequence[Weights],
    method: str = methods.RECOMMENDED,
    *,
    out_dtype: torch.dtype | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge models that were tuned from one base, in memory.

    A matrix is taken to be stored as ``(out, in)``, as ``torch.nn.Linear`` has it. For a model
    that stores some as ``(in, out)``, like GPT-2, call ``merge``: ``stf`` does not mind, ``wudi``
    does.

    Args:
        base: the weights that all models were tuned from.
        models: the tuned models, in a list or by name; they have the names and shapes of the base.
        method: the name of the merge method; those of mergekit are known too.
        out_dtype: the type of the result; that of the inputs if None.
        parameters: of the method, as in a recipe. Of ``weight`` and ``density``, which each model
            may have its own, a list in the order of the models, or a mapping by their names.
            What is no Python name is given as ``**{"lambda": 0.5}``.

    Returns:
        The merged weights by name, in the order of the base. No input is changed.

    Raises:
        STFError: the models do not fit the base, or a parameter is unknown or out of range; the
            message names the weight or the parameter.

    Example:
        >>> import torch
        >>> base = {"layer.weight": torch.zeros(2, 2)}
        >>> first = {"layer.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
        >>> second = {"layer.weight": torch.tensor([[0.0, 0.0], [0.0, 2.0]])}
        >>> merge_weights(base, [first, second], "stf", **{"lambda": 1.0})
        {'layer.weight': tensor([[1., 0.],
                [0., 2.]])}
    """
    register_with_mergekit()
    named = models if isinstance(models, Mapping) else _numbered(models)
    if BASE in named:
        raise STFError(f"no model may be called {BASE!r}, which is what messages call the base")
    inputs = {BASE: _state(base), **{name: _state(model) for name, model in named.items()}}
    _check_weights(inputs)
    given = {name: _per_model(name, value, list(named)) for name, value in parameters.items()}
    with torch.no_grad():
        merged: dict[str, Tensor] = merge_methods.merge_state_dicts(
            inputs, _known(method, given), parameters=given, base=BASE, out_dtype=out_dtype
        )
    return merged


def _numbered(models: Sequence[Weights]) -> dict[str, Weights]:
    return {f"models[{index}]": model for index, model in enumerate(models)}


def _state(model: Weights) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, torch.nn.Module) else model


def _check_weights(inputs: Mapping[str, Mapping[str, Tensor]]) -> None:
    base = inputs[BASE]
    for model, state in inputs.items():
        if differing := sorted(base.keys() ^ state.keys()):
            lacks, has = (BASE, model) if differing[0] in state else (model, BASE)
            raise STFError(
                f"{differing[0]}: {lacks} lacks this weight, which {has} has "
                f"({len(differing)} such weights in all)"
            )
        for name, tensor in state.items():
            if tensor.shape != base[name].shape:
                raise STFError(
                    f"{name}: {model} has shape {tuple(tensor.shape)}, the base has "
                    f"{tuple(base[name].shape)}; only models of one size can be merged"
                )


def _per_model(name: str, value: Any, models: list[str]) -> Any:
    """Return the values of a list by the names of the models."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != len(models):
        raise STFError(f"{name} has {len(value)} values for {len(models)} models")
    return dict(zip(models, value, strict=True))


def _known(method: str, parameters: Mapping[str, Any]) -> str:
    """Return the name of a method that mergekit knows and that has these parameters."""
    specs = {found.spec.name: found.spec for found in merge_methods.registered_methods()}
    if method not in specs:
        raise STFError(f"unknown method {method!r}{did_you_mean(method, sorted(specs))}")
    own = [parameter.name for parameter in specs[method].parameters]
    for name in parameters:
        if name not in own:
            raise STFError(f"{method} has no parameter {name!r}{did_you_mean(name, own)}")
    return method
