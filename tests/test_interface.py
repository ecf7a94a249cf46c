"""The public interface: what it is, what it costs to import, and that its examples run."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mergekit_stf
from mergekit_stf import STFError, merge, merge_weights, plan
from mergekit_stf.host.run import in_memory
from tests.environments import ROOT
from tests.host.models import Checkpoints, llama, perturb, save_family
from tests.oracle import merge_weight

PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_family("llama", tmp_path_factory.mktemp("models"))


def content(models: Checkpoints, method: str = "stf") -> dict[str, Any]:
    tuned = [{"model": str(path)} for path in models.tuned]
    return {"merge_method": method, "base_model": str(models.base), "models": tuned}


def test_the_import_of_the_package_stays_light() -> None:
    code = (
        "import sys, mergekit_stf; print('torch' in sys.modules, 'mergekit' in sys.modules);"
        "print('merge_weights' in dir(mergekit_stf));"
        "from mergekit_stf import merge_weights; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "True"]


def test_the_page_lists_what_is_public() -> None:
    listed = re.findall(r"^## `(\w+)`", PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(mergekit_stf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergekit_stf.nothing


def test_the_examples_of_docstrings_hold() -> None:
    assert doctest.testmod(in_memory).attempted
    assert not doctest.testmod(in_memory).failed


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = save_family("llama", tmp_path, tasks=2)
    for folder, name in zip(made.tuned, ("math", "code"), strict=True):
        folder.rename(tmp_path / name)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    assert "mean" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_weights_in_memory_are_merged_by_value() -> None:
    base = llama()
    tuned = [perturb(base, seed) for seed in (1, 2)]
    merged = merge_weights(base, tuned, "stf", density=0.5, **{"lambda": 0.9})
    assert list(merged) == list(base.state_dict())
    name = "model.layers.1.mlp.down_proj.weight"
    first, *others = (model.state_dict()[name].double().numpy() for model in (base, *tuned))
    expected = merge_weight(first, others, "superpose", (1, 1), (0.5, 0.5), 0.9)
    torch.testing.assert_close(merged[name].double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_values_of_single_models_come_in_a_list_or_by_name() -> None:
    base = {"a.weight": torch.zeros(2, 2)}
    one, two = ({"a.weight": torch.full((2, 2), x)} for x in (1.0, 2.0))
    given = merge_weights(base, [one, two], "task_arithmetic", weight=[1.0, 0.0])
    named = merge_weights(
        base, {"one": one, "two": two}, "task_arithmetic", weight={"one": 1.0, "two": 0.0}
    )
    assert torch.equal(given["a.weight"], one["a.weight"])
    assert torch.equal(named["a.weight"], one["a.weight"])


W = {"a.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("models", "method", "parameters", "message"),
    [
        ([{"b.weight": torch.ones(2, 2)}], "stf", {}, r"a\.weight: models\[0\] lacks this weight"),
        ([W | {"c": torch.ones(1)}], "stf", {}, r"c: base_model lacks this weight"),
        ([{"a.weight": torch.ones(3, 2)}], "stf", {}, r"models\[0\] has shape \(3, 2\)"),
        ([W], "sft", {}, "unknown method 'sft'"),
        ([W], "stf", {"lamda": 1.0}, "no parameter 'lamda'"),
        ([W], "stf", {"density": 2.0}, "`density`"),
        ([W], "stf", {"weight": [1.0, 2.0]}, "weight has 2 values for 1 models"),
        ([], "stf", {}, "at least one model besides"),
        ({"base_model": W}, "stf", {}, "no model may be called"),
    ],
)
def test_what_does_not_fit_is_said(
    models: Any, method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(STFError, match=message):
        merge_weights(W, models, method, **parameters)


def test_a_plan_prints_what_the_command_prints(models: Checkpoints, tmp_path: Path) -> None:
    found = plan(content(models), tmp_path / "out")
    assert {row.rule for row in found.rules} == {"superpose", "sum", "mean"}
    assert str(found).splitlines()[0].split() == ["rule", "weights", "parameters"]
    assert found.probe is None


def test_a_merge_of_a_mapping_and_of_a_file_are_one(models: Checkpoints, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(content(models)), encoding="utf-8")
    folders = [
        merge(content(models), tmp_path / "a", quiet=True),
        merge(str(recipe), tmp_path / "b", quiet=True),
    ]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(STFError, match=r"is there already|exists|--force|force"):
        merge(recipe, tmp_path / "a")
    with pytest.raises(STFError, match="no option 'devise'; did you mean 'device'"):
        plan(recipe, devise="cuda")
