"""What defines the merge, checked on written checkpoints: each kept feature keeps its response."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

from tests import oracle
from tests.host.merging import LAMBDA, State, merge, parameters, recipe, reload, rules_of
from tests.host.models import save_family

SEVEN = ["llama", "gpt2", "t5-v1.1", "qwen3", "gemma3", "mixtral", "clip-vision"]


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("family", SEVEN)
def test_every_feature_keeps_its_response(family: str, density: float, tmp_path: Path) -> None:
    checkpoints = save_family(family, tmp_path)
    merge(recipe(checkpoints, density), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(checkpoints.base)
    model_class = getattr(transformers, config.architectures[0])
    rules = rules_of(reload(checkpoints.base, model_class))
    base, out, *tuned = (
        parameters(folder, model_class)
        for folder in (checkpoints.base, tmp_path / "out", *checkpoints.tuned)
    )
    superposed = [name for name, rule in rules.items() if rule == "superpose"]
    assert superposed
    for name in superposed:
        assert worst_response(name, base, out, tuned, density) <= 1e-5, name


def worst_response(name: str, base: State, out: State, tuned: list[State], density: float) -> float:
    """Return the largest ``|u_kᵀ M v_k - s_k| / s_1`` over all tasks, experts one by one."""

    def matrices(state: State) -> np.ndarray:
        array = state[name].double().numpy()
        return array if array.ndim == 3 else array[None]

    worst = 0.0
    for index, (P0, P) in enumerate(zip(matrices(base), matrices(out), strict=True)):
        for one in tuned:
            task = oracle.trim(matrices(one)[index] - P0, density)
            U, s, Vh = np.linalg.svd(task, full_matrices=False)
            kept = s > 1e-6 * s[0]
            response = np.einsum("mk,mn,kn->k", U[:, kept], (P - P0) / LAMBDA, Vh[kept])
            worst = max(worst, float(np.abs(response - s[kept]).max() / s[0]))
    return worst
