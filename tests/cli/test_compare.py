"""One recipe by several methods: each point is what ``merge`` makes of the recipe, by value."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.recipe.grid import method_points, parse_options
from mergekit_stf.host.recipe.recipe import check_recipe, load_recipe
from tests import processes
from tests.cli.merges import run, write_recipe
from tests.host.merging import parameters, relative_error
from tests.host.models import Checkpoints, save_family, tensors_of

METHODS = "wudi,stf,tsv_m,ties,linear"
SIZE = f"{sys.executable} -c 'import sys; print(len(sys.argv[1]))' {{out}}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("models")
    return save_family("llama", folder, tasks=2, dtype=torch.bfloat16, layout="sharded")


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", models, density=0.5, rank=0.5, ridge=0.01)


def content(recipe: Path, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return data | changes


def of(recipe: Path, method: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of the only point of one method."""
    (point,), _ = method_points(load_recipe(recipe), [method], {}, **options)
    data: dict[str, Any] = yaml.safe_load(point.recipe.text)
    return data


def test_each_point_is_a_merge_of_the_recipe_by_that_method(
    recipe: Path, models: Checkpoints, tmp_path: Path
) -> None:
    """Our own byte for byte, the host's against their formulas in float64."""
    out = tmp_path / "out"
    done = run("compare", recipe, out, "--methods", METHODS, "--lambda", "0.5,1", "--quiet")
    assert done.exit_code == 0, done.output
    for name, own in (("wudi", {}), ("stf", {"rank": 0.5, "ridge": 0.01}), ("tsv_m", {})):
        for scale in ("0.5", "1"):
            settings = {"density": 0.5, "lambda": float(scale), **own}
            single = tmp_path / "single.yml"
            single.write_text(
                yaml.safe_dump(content(recipe, merge_method=name, parameters=settings)),
                encoding="utf-8",
            )
            folder = tmp_path / f"{name}-{scale}"
            assert run("merge", single, folder, "--quiet").exit_code == 0
            wanted, found = tensors_of(folder), tensors_of(out / f"{name}_lambda-{scale}")
            assert found.keys() == wanted.keys()
            assert all(found[key].equal(wanted[key]) for key in wanted)
    kind = transformers.LlamaForCausalLM
    tuned = [parameters(folder, kind) for folder in models.tuned]
    mean = parameters(out / "linear", kind)
    for key, P in mean.items():
        wanted_mean = sum(one[key].double() for one in tuned) / 2
        assert relative_error(P, wanted_mean, torch.zeros_like(P)) < 2**-8, key


def test_a_table_a_plot_and_the_best_recipe(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("compare", recipe, out, "--methods", "wudi,ties,linear", "--vary", "ridge=0.1,0.3")
    done = run(*words, "--eval", SIZE)
    assert done.exit_code == 0, done.output
    rows = list(csv.reader((out / "compare.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["method", "ridge", "score", "folder"]
    assert [row[:2] for row in rows[1:]] == [
        ["wudi", "0.1"], ["wudi", "0.3"], ["ties", ""], ["linear", ""]
    ]  # fmt: skip
    assert [float(row[2]) for row in rows[1:]] == [len(row[3]) for row in rows[1:]]
    best = yaml.safe_load((out / "best.yml").read_text("utf-8"))
    assert (best["merge_method"], best["parameters"]) == ("wudi", {"density": 0.5, "ridge": 0.1})
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "wudi is merged without the recipe's rank, ridge" in done.stderr
    assert "linear is merged without the recipe's density, rank, ridge, base_model" in done.stderr
    again = run(*words[:4], "wudi,ties,linear", "--eval", SIZE, "--lower-is-better")
    assert "ties is there already" in again.output
    assert "linear is there already" in again.output
    best = yaml.safe_load((out / "best.yml").read_text("utf-8"))
    assert best["merge_method"] in ("wudi", "ties")


def test_what_a_method_does_not_know_is_left_out(recipe: Path, models: Checkpoints) -> None:
    """An option of the same name and another meaning is not carried over."""
    base, tuned = str(models.base), [{"model": str(folder)} for folder in models.tuned]
    same = {"base_model": base, "models": tuned}
    half = {"density": 0.5}
    assert of(recipe, "stf")["parameters"] == half | {"rank": 0.5, "ridge": 0.01}
    assert of(recipe, "wudi") == {**same, "merge_method": "wudi", "parameters": half}
    assert of(recipe, "ties") == {
        **same, "merge_method": "ties", "parameters": half | {"weight": 1.0}
    }  # fmt: skip
    assert of(recipe, "linear") == {
        "models": tuned, "merge_method": "linear", "parameters": {"weight": 1.0}
    }  # fmt: skip
    assert of(recipe, "wudi", defaults=True)["parameters"] == {}
    assert of(recipe, "stf", defaults=True)["parameters"] == {}
    assert of(recipe, "ties", defaults=True)["parameters"] == {"weight": 1.0}


def test_a_recipe_of_the_hosts_own(recipe: Path, models: Checkpoints, tmp_path: Path) -> None:
    """Settings of single models and layers stay; what only TIES reads is left out."""
    data = content(recipe, merge_method="ties")
    data["models"][0]["parameters"] = {"weight": [0.2, 0.9], "density": 0.3}
    data["parameters"] = {"weight": 0.5, "normalize": True, "int8_mask": True, "lambda": 0.7}
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    wudi = of(recipe, "wudi")
    assert wudi["models"] == data["models"]
    assert wudi["parameters"] == {"weight": 0.5, "lambda": 0.7}
    assert of(recipe, "dare_ties")["parameters"] == data["parameters"]
    linear = of(recipe, "linear")
    assert linear["models"][0]["parameters"] == {"weight": [0.2, 0.9]}
    assert linear["parameters"] == {"weight": 0.5, "normalize": True}
    done = run("compare", recipe, tmp_path / "out", "--methods", "wudi,dare_ties", "--quiet")
    assert done.exit_code == 0, done.output


def test_the_base_among_the_sources_of_a_slice(recipe: Path, models: Checkpoints) -> None:
    names = (models.base, *models.tuned)
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in names]
    data = content(recipe, slices=[{"sources": sources}])
    del data["models"]
    text = yaml.safe_dump(data)
    points, recasts = method_points(check_recipe(text), ["linear", "wudi"], {})
    linear, wudi = (yaml.safe_load(point.recipe.text) for point in points)
    assert linear["slices"] == [{"sources": sources[1:]}]
    assert "base_model" not in linear
    assert wudi["slices"] == [{"sources": sources}]
    assert [found.without_base for found in recasts.values()] == [True, False]


def test_a_method_is_varied_over_what_it_knows(recipe: Path) -> None:
    values = {"lambda": (0.5, 1.0), "prior": ("sum", "mean"), "normalize": (True, False)}
    points, _ = method_points(load_recipe(recipe), ["wudi", "ties", "linear"], values)
    assert [point.name for point in points] == [
        *(f"wudi_prior-{prior}_lambda-{x}" for prior in ("sum", "mean") for x in ("0.5", "1")),
        *(f"ties_normalize-{on}_lambda-{x}" for on in ("true", "false") for x in ("0.5", "1")),
        "linear_normalize-true",
        "linear_normalize-false",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "wudi,tsv"], "there is no merge method 'tsv'; did you mean 'tsv_m'?"),
        (["--methods", "wudi,slerp", "--vary", "t=0.5"], "exactly 2 inputs"),
        (["--methods", "wudi", "--vary", "normalize=true"], "has a parameter 'normalize'"),
        (["--methods", "wudi,stf", "--vary", "priro=sum"], "did you mean 'prior'?"),
        (["--methods", "wudi", "--vary", "prior=some"], "method wudi, prior some"),
        (["--methods", "wudi,nearswap"], "nearswap needs 't'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path
) -> None:
    failed = run("compare", recipe, tmp_path / "out", *arguments)
    assert failed.exit_code == 1
    assert message in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "wudi,,stf"], "no list of methods"),
        ([], "Missing option '--methods'"),
        (["--methods", "stf", "--vary", "ridge"], "is not NAME=VALUES"),
        (["--methods", "stf", "--vary", "ridge=1:2"], "neither a list"),
        (["--methods", "stf", "--vary", "rank=1", "--rank", "1"], "rank is given twice"),
    ],
)
def test_a_command_line_that_says_nothing(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path
) -> None:
    failed = run("compare", recipe, tmp_path / "out", *arguments)
    assert failed.exit_code == 2
    assert message in failed.stderr


def test_values_of_options_are_read() -> None:
    assert parse_options("auto,0.1:0.3:0.1") == ("auto", 0.1, 0.2, 0.3)
    assert parse_options("true,false") == (True, False)
    with pytest.raises(STFError, match="neither a list"):
        parse_options("rows 2")


def test_force_merges_again_what_has_changed(
    recipe: Path, models: Checkpoints, tmp_path: Path
) -> None:
    out, words = tmp_path / "out", ("--methods", "wudi,ties")
    assert run("compare", recipe, out, *words, "--quiet").exit_code == 0
    wanted = tensors_of(out / "ties")
    (out / "ties" / "config.json").write_text("{}", encoding="utf-8")
    failed = run("compare", recipe, out, *words)
    assert failed.exit_code == 1
    assert "output config.json: " in failed.stderr
    assert "give --force" in failed.stderr
    done = run("compare", recipe, out, *words, "--force")
    assert "wudi is there already" in done.output
    assert "ties merged again" in done.output
    found = tensors_of(out / "ties")
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    recipe: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = ("compare", recipe, out, "--methods", "wudi,stf,ties")
    running = processes.start(*words, log=log)
    running.until(out / "wudi", "stf.lock.json")
    assert running.process.pid is not None
    os.kill(running.process.pid, signal.SIGINT)
    assert running.wait() == 130, running.text
    assert "of 3 points are finished in" in running.text
    code, text = processes.run(*words, log=log)
    assert code == 0, text
    assert "wudi is there already" in text
    assert "[3/3]" in text
    assert not (out / ".store").exists()
