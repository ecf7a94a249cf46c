"""Merges tiny checkpoints through the real command line and says what the weights must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml
from transformers import PreTrainedModel

from tests import oracle
from tests.host.models import Checkpoints
from tests.rules import rule_for

LAMBDA = 0.8
State = dict[str, torch.Tensor]


def recipe(checkpoints: Checkpoints, density: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a recipe that merges all tuned checkpoints with ``stf``."""
    models = [
        {"model": str(folder), "parameters": {"density": density}} for folder in checkpoints.tuned
    ]
    shared = {"merge_method": "stf", "base_model": str(checkpoints.base), "models": models}
    return shared | {"parameters": {"lambda": LAMBDA}} | more


def merge(config: Mapping[str, Any], out: Path, *options: str) -> None:
    """Run ``mergekit-yaml`` on a recipe, in this process."""
    LoaderCache().loaders.clear()
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(dict(config)))
    arguments = [str(file), str(out), "--quiet", "--no-copy-tokenizer", *options]
    CliRunner().invoke(mergekit_yaml, arguments, catch_exceptions=False, standalone_mode=False)


def reload(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Load a checkpoint and insist that transformers finds every weight in it and no other."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], sorted(info["missing_keys"])
    assert not info["unexpected_keys"], sorted(info["unexpected_keys"])
    assert not info["mismatched_keys"]
    return model


def parameters(folder: Path, model_class: type[PreTrainedModel]) -> State:
    return state(reload(folder, model_class))


def state(model: PreTrainedModel) -> State:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected(
    base: State, tuned: Sequence[State], rules: Mapping[str, str], density: float
) -> State:
    """Return the oracle's merge of every parameter, experts one by one."""
    merged = {}
    for name, tensor in base.items():
        arrays = [one[name].double().numpy() for one in (base, *tuned)]
        stacked = rules[name] == "superpose" and tensor.ndim == 3
        parts = zip(*arrays, strict=True) if stacked else [arrays]
        done = [_oracle(part, rules[name], density) for part in parts]
        merged[name] = torch.from_numpy(np.asarray(done if stacked else done[0]))
    return merged


def _oracle(arrays: Sequence[np.ndarray], rule: str, density: float) -> np.ndarray:
    base, *tuned = arrays
    weights, densities = [1.0] * len(tuned), [density] * len(tuned)
    return oracle.merge_weight(base, tuned, rule, weights, densities, LAMBDA)


def rules_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the rule of every parameter by its name in the model."""
    axes = vocabulary_axes(model)
    return {n: rule_for(n, p.shape, axes.get(n)) for n, p in model.named_parameters()}


def vocabulary_axes(model: PreTrainedModel) -> dict[str, int]:
    try:
        return infer_vocabulary_axes(model)
    except NotImplementedError:  # raised for models without one input embedding
        return {}


def relative_error(merged: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """Return ‖merged - oracle‖ / ‖oracle - base‖, 0 where both are zero."""
    error = torch.linalg.vector_norm(merged.double() - wanted)
    moved = torch.linalg.vector_norm(wanted - base.double())
    return float(error / moved) if error else 0.0


def worst_error(checkpoints: Checkpoints, out: Path, density: float) -> tuple[float, str]:
    """Compare a merged checkpoint with the oracle; return the largest error and its weight."""
    config = transformers.AutoConfig.from_pretrained(checkpoints.base)
    model_class = getattr(transformers, config.architectures[0])
    base_model = reload(checkpoints.base, model_class)
    base = state(base_model)
    tuned = [parameters(folder, model_class) for folder in checkpoints.tuned]
    wanted = expected(base, tuned, rules_of(base_model), density)
    merged = parameters(out, model_class)
    assert merged.keys() == wanted.keys()
    return max((relative_error(merged[n], wanted[n], base[n]), n) for n in wanted)
