"""The rule from name, shape and vocabulary axis, against the module that owns the weight."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_stf.host.architectures.exact import weights_of
from tests.host.audit import EXCEPTIONS
from tests.host.classes import AUDITED, meta_model
from tests.host.merging import vocabulary_axes
from tests.rules import rule_for

LINEAR = (nn.Linear, Conv1D)
HELD = re.compile(r"in_proj_weight|mm_input_projection_weight")
"""Matrices of linear maps that their module multiplies by itself, without a linear layer."""


def rule_of_module(module: nn.Module, parameter: str, tensor: torch.Tensor) -> str:
    kind = type(module).__name__
    if "Norm" in kind and "Embedding" not in kind:
        return "mean"
    linear = isinstance(module, LINEAR) or "Router" in kind or HELD.fullmatch(parameter)
    if tensor.ndim == 2 and linear and "bias" not in parameter:
        return "superpose"
    if tensor.ndim == 3 and "Experts" in kind:
        return "superpose"
    return "sum"


@pytest.mark.parametrize("label", AUDITED)
def test_rule_is_the_one_of_the_owning_module(label: str) -> None:
    model = meta_model(label)
    axes = vocabulary_axes(model)
    found, wanted = {}, {}
    for path, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            name = f"{path}.{parameter}".removeprefix(".")
            found[name] = rule_for(name, tensor.shape, axes.get(name))
            own = rule_of_module(module, parameter, tensor)
            wanted[name] = "sum" if name in axes else own
    differing = {name: (found[name], wanted[name]) for name in found if found[name] != wanted[name]}
    assert {name: rules for name, rules in differing.items() if known(name) != rules} == {}
    assert spelled_otherwise(model, found) == {}


def known(name: str) -> tuple[str, str] | None:
    """Return the two rules of a name in the documented table of exceptions."""
    matches = (rules[:2] for kind, rules in EXCEPTIONS.items() if re.fullmatch(kind, name))
    return next(matches, None)


def spelled_otherwise(model: PreTrainedModel, found: dict[str, str]) -> dict[str, str]:
    """Return the stored names whose rule is not the one of the parameter that they fill."""
    axes, shapes = vocabulary_axes(model), {n: p.shape for n, p in model.named_parameters()}
    wrong = {}
    for info in weights_of(model):
        names = [info.name, *(info.aliases or ())]
        for parameter in shapes.keys() & set(names):
            rules = {n: rule_for(n, shapes[parameter], axes.get(parameter)) for n in names}
            wrong |= {n: rule for n, rule in rules.items() if rule != found[parameter]}
    return wrong


def test_vocabulary_without_an_axis_is_known_by_name() -> None:
    """``mergekit-pytorch`` hands the method no axis."""
    names = (
        "model.embed_tokens transformer.wte shared embeddings.word_embeddings lm_head embed_out"
        " transformer.wpe encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    )
    for name in names.split():
        assert rule_for(f"{name}.weight", (40, 16), None) == "sum"


def test_weights_without_a_name_go_by_their_shape() -> None:
    assert rule_for(None, (4, 4), None) == "superpose"
    assert rule_for(None, (4, 4), 0) == "sum"
    assert rule_for(None, (4,), None) == "sum"
    assert rule_for(None, (2, 4, 4), None) == "sum"


def test_gamma_and_beta_of_old_checkpoints_are_normalisation() -> None:
    assert rule_for("bert.embeddings.LayerNorm.gamma", (4,), None) == "mean"
    assert rule_for("bert.embeddings.LayerNorm.beta", (4,), None) == "mean"
