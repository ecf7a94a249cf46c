"""Every registered method goes through every command, on sharded bfloat16 models, by value.

A method that is registered and has no oracle fails here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergekit_stf.core import methods
from mergekit_stf.host.merging import desk
from tests.cli.merges import run, write_recipe
from tests.host.merging import (
    State,
    expected,
    parameters,
    relative_error,
    reload,
    rules_of,
    state,
)
from tests.host.models import Checkpoints, save_family, tensors_of
from tests.host.test_methods import wanted

DENSITY = 0.4
TOLERANCE = 1e-4
KIND = transformers.LlamaForCausalLM


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("models")
    return save_family("llama", folder, tasks=2, dtype=torch.bfloat16, layout="sharded")


def oracle(method: str, models: Checkpoints) -> State:
    """Return what a method at its defaults makes of every parameter, in float64."""
    model = reload(models.base, KIND).float()
    tuned = [{n: P.float() for n, P in parameters(f, KIND).items()} for f in models.tuned]
    if method == "stf":
        return expected(state(model), tuned, rules_of(model), DENSITY)
    return wanted(method, model, tuned, density=DENSITY)


def check_values(found: Path, answer: State, models: Checkpoints) -> None:
    base, merged = parameters(models.base, KIND), parameters(found, KIND)
    assert merged.keys() == answer.keys()
    for name, P in answer.items():
        error = relative_error(merged[name], P, base[name].float())
        assert error <= TOLERANCE, (name, error)


def interrupt_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Raise what Ctrl-C raises when so many weights have been merged."""
    original: Callable[..., Any] = desk.merge_matrix
    calls: list[int] = []

    def merged(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return original(*arguments)

    patch.setattr(desk, "merge_matrix", merged)


@pytest.mark.parametrize("method", methods.names())
def test_every_command_works_for_the_method(
    method: str, models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", models, density=DENSITY)
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data |= {"merge_method": method, "dtype": "float32"}
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    out = tmp_path / "out"

    planned = run("plan", recipe, "--out", out, "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert sum(row["weights"] for row in plan["rules"]) == len(tensors_of(models.base))
    assert plan["estimate"]["merging"] > 0

    with monkeypatch.context() as patch:
        interrupt_after(12, patch)
        assert run("merge", recipe, out).exit_code == 130
    assert not out.exists()
    stored = len(list((tmp_path / "out.stf-work" / "store").glob("*.stf.safetensors")))
    assert stored > 1
    done = run("merge", recipe, out, "--out-shard-size", 16000)
    assert done.exit_code == 0, done.output
    assert f" {stored} matrices found" in done.output
    check_values(out, oracle(method, models), models)

    scale = methods.get(method).default_lambda
    swept = run("sweep", recipe, tmp_path / "sweep", "--lambda", f"{scale},{scale / 2}")
    assert swept.exit_code == 0, swept.output
    table = (tmp_path / "sweep" / "sweep.csv").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 3
    first, second = (
        tensors_of(tmp_path / "sweep" / f"lambda-{value:g}") for value in (scale, scale / 2)
    )
    assert all(first[name].equal(P) for name, P in tensors_of(out).items())
    name = "model.layers.1.mlp.up_proj.weight"
    base = tensors_of(models.base)[name].float()
    assert torch.allclose(first[name] - base, 2 * (second[name] - base), atol=1e-6)

    rebuilt = run("verify", out, "--rebuild")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert "merged again to the same bytes" in rebuilt.output

    reported = run("report", out, "--sample", 2, "--quiet")
    assert reported.exit_code == 0, reported.output
    page = (out / "stf-report.html").read_text(encoding="utf-8")
    assert f"What merging with <code>{method}</code> did" in page
