"""Every method of ours besides STF through ``mergekit-yaml``, by value, on real architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.elementwise_oracles import consensus_ta, localize_stitch, metagpt, pcb
from tests.host import models
from tests.host.merging import (
    State,
    merge,
    parameters,
    recipe,
    relative_error,
    reload,
    rules_of,
    state,
)
from tests.oracle import superpose, trim
from tests.subspace_oracles import calibrate, iso_c, iso_cts, knots, tsv_m
from tests.wudi_oracle import wudi

ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "pcb": pcb,
    "consensus_ta": consensus_ta,
    "localize_stitch": localize_stitch,
    "metagpt": metagpt,
}
"""Methods that merge weights of every kind."""

ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "wudi": wudi,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "knots": knots,
    **ELEMENTWISE,
}
SUPERPOSED: dict[str, Callable[..., np.ndarray]] = {
    "stf": lambda matrices, input_axis: superpose(matrices)
}
"""Compared without options elsewhere."""

AVERAGED = ("tsv_m", "iso_c", "iso_cts", "knots")
LAMBDAS = {"consensus_ta": 0.4, "knots": 0.5}
"""Of the methods whose default is not 1."""


def gpt_oss() -> PreTrainedModel:
    """A mixture whose experts store their weights as (in, out), as the layers of GPT-2 do."""
    config = transformers.GptOssConfig(
        **models.TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return models.build("GptOssForCausalLM", config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: models.FAMILIES[name] for name in ("llama", "gpt2", "t5", "mixtral")},
    "gpt-oss": gpt_oss,
}


def turned(model: PreTrainedModel) -> set[str]:
    """Return the weights that are stored as (in, out)."""
    found = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    experts = {n for n, _ in model.named_parameters() if "experts." in n}
    return found | (experts if type(model).__name__.startswith("GptOss") else set())


def squared_distances(base: State, tuned: list[State]) -> list[float]:
    return [
        sum(float((one[n].double() - base[n].double()).square().sum()) for n in base)
        for one in tuned
    ]


def wanted(method: str, model: PreTrainedModel, tuned: list[State], **given: Any) -> State:
    """Return what a method at its default lambda makes of every parameter."""
    base, rules, rows = state(model), rules_of(model), turned(model)
    oracle = (ORACLES | SUPERPOSED)[method]
    given.pop("lambda", None)
    density, alpha, found = given.pop("density", 1.0), float(given.pop("calibrate", 0)), {}
    if method == "metagpt":
        given["squares"] = squared_distances(base, tuned)
    for name, tensor in base.items():
        P0, *others = (one[name].double().numpy() for one in (base, *tuned))
        deltas = np.stack([P - P0 for P in others])
        linear = rules[name] == "superpose"
        stack = deltas[:, None] if not (linear and tensor.ndim == 3) else deltas
        parts = [[trim(M, density) for M in matrices] for matrices in stack.swapaxes(0, 1)]
        axis = 0 if name in rows else 1
        own = linear or method in ELEMENTWISE
        merged = [
            oracle(matrices, input_axis=axis, **given) if own else sum(matrices)
            for matrices in parts
        ]
        if alpha and linear:
            merged = [calibrate(M, A, alpha, axis) for M, A in zip(merged, parts, strict=True)]
        total = np.stack(merged).reshape(P0.shape)
        averaged = not own and (rules[name] == "mean" or method in AVERAGED)
        scale = 1 / len(tuned) if averaged else LAMBDAS.get(method, 1.0)
        found[name] = torch.from_numpy(P0 + scale * total)
    return found


@pytest.mark.parametrize(
    ("family", "density"), [*((family, 1.0) for family in FAMILIES), ("llama", 0.4)]
)
@pytest.mark.parametrize("method", ORACLES)
def test_a_merge_equals_the_oracle(
    family: str, method: str, density: float, tmp_path: Path
) -> None:
    checkpoints = models.save_model(FAMILIES[family](), tmp_path, layout="sharded")
    config = recipe(checkpoints, density, merge_method=method)
    del config["parameters"]
    error, name = worst(config, checkpoints, tmp_path / "out", density=density)
    assert error <= 1e-4, name


OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("wudi", {"ridge": 0, "weighting": "equal"}),
    ("wudi", {"ridge": 0, "weighting": "equal", "inputs": 0.5, "prior": "none"}),
    ("wudi", {"calibrate": True}),
    ("tsv_m", {"calibrate": 0.5}),
    ("stf", {"calibrate": True, "lambda": 1.0}),
    ("knots", {"keep": 0.3, "calibrate": True}),
    ("iso_cts", {"common": 0.5}),
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "options"), OPTIONS, ids=[f"{m} {' '.join(o)}" for m, o in OPTIONS]
)
def test_a_merge_with_options_equals_the_oracle(
    family: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints = models.save_model(FAMILIES[family](), tmp_path, layout="sharded")
    config = recipe(checkpoints, merge_method=method, parameters=options)
    error, name = worst(config, checkpoints, tmp_path / "out", **options)
    assert error <= 1e-4, name


def worst(
    config: dict[str, Any], checkpoints: models.Checkpoints, out: Path, **options: Any
) -> tuple[float, str]:
    """Merge, compare with the oracle, and return the largest error and its weight."""
    merge(config, out)
    base_model = transformers.AutoConfig.from_pretrained(checkpoints.base).architectures[0]
    model = reload(checkpoints.base, getattr(transformers, base_model))
    tuned = [parameters(folder, type(model)) for folder in checkpoints.tuned]
    expected = wanted(config["merge_method"], model, tuned, **options)
    merged, base = parameters(out, type(model)), state(model)
    assert merged.keys() == expected.keys()
    return max((relative_error(merged[n], expected[n], base[n]), n) for n in expected)
