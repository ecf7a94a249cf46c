"""``mergekit-stf init``: recipes that can be merged, and what it says of wrong models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from mergekit_stf.core import methods
from mergekit_stf.core.methods import RECOMMENDED
from mergekit_stf.host.plugin.parameters import options_of
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.models import Checkpoints, gpt2, llama, save_model
from tests.host.peft_adapters import save_adapter


@pytest.fixture(scope="module")
def folder(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three tuned models, and what does not belong to them."""
    root = tmp_path_factory.mktemp("models")
    tiny_models(root, layout=layout)
    save_model(gpt2(), root / "gpt2", tasks=0)
    save_model(llama(hidden_size=32), root / "wide", tasks=0)
    for seed in (1, 2):
        save_adapter(root / "base", root / f"adapter{seed}", seed, target_modules=["q_proj"])
    return root


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_recipe_of_three_checkpoints_is_planned_and_merged(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    done = run("init", "base", "tuned1", "tuned2", "./tuned3", "--out", recipe)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-3:] == [
        "Next:", f"  mergekit-stf plan {recipe}", f"  mergekit-stf merge {recipe} merged",
    ]  # fmt: skip
    assert run("plan", recipe, "--strict").exit_code == 0
    assert run("merge", recipe, out).exit_code == 0
    base, *tuned = (Path(name) for name in ("base", "tuned1", "tuned2", "tuned3"))
    bare = write_recipe(tmp_path / "bare.yml", Checkpoints(base.resolve(), tuple(
        path.resolve() for path in tuned)))  # fmt: skip
    bare.write_text(bare.read_text().replace("stf", RECOMMENDED))
    assert run("merge", bare, tmp_path / "plain").exit_code == 0
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name  # what it spells out are the defaults


@pytest.mark.parametrize("method", methods.names())
def test_the_recipe_explains_every_option_of_the_method(tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "recipe.yml"
    done = run("init", "base", "tuned1", "tuned2", "-o", recipe, "--method", method)
    assert done.exit_code == 0, done.output
    text = recipe.read_text("utf-8")
    data = yaml.safe_load(text)
    assert data["merge_method"] == method
    assert [entry["model"] for entry in data["models"]] == ["./tuned1", "./tuned2"]
    for option in options_of(methods.get(method)):
        if option.name not in ("rule", "split"):
            where = data["models"][1] if option.per_model else data
            assert where["parameters"][option.name] == option.default
            assert f"# {option.help}" in text
    assert all(
        f"# {line}".rstrip() in text.splitlines()
        for line in done.stdout.split("\n\n")[0].splitlines()
    )


def test_adapters_are_known_by_their_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    done = run("init", "base", "adapter1", "adapter2", "-o", recipe)
    assert done.exit_code == 0, done.output
    assert f"  mergekit-stf lora {recipe} merged" in done.stdout
    models = yaml.safe_load(recipe.read_text("utf-8"))["models"]
    assert [entry["model"] for entry in models] == ["./base+./adapter1", "./base+./adapter2"]
    for number, command in enumerate(("plan", "merge", "lora")):
        out = () if command == "plan" else (tmp_path / str(number),)
        done = run(command, recipe, *out)
        assert done.exit_code == 0, done.output


def test_an_adapter_of_another_base_is_named(tmp_path: Path) -> None:
    shutil.copytree("adapter1", tmp_path / "moved")
    settings = tmp_path / "moved" / "adapter_config.json"
    named = json.loads(settings.read_text()) | {"base_model_name_or_path": "someone/else"}
    settings.write_text(json.dumps(named))
    done = run("init", "base", tmp_path / "moved", "-o", tmp_path / "recipe.yml")
    assert done.exit_code == 0
    warning = f"{tmp_path}/moved says that it was trained on someone/else; check that ./base is"
    assert warning in done.stderr
    assert warning in (tmp_path / "recipe.yml").read_text()


@pytest.mark.parametrize(
    ("base", "model", "said"),
    [
        ("base", "gpt2/base", "./gpt2/base is a GPT2LMHeadModel, the base ./base a LlamaForCausal"),
        ("base", "wide/base", "only models of one architecture and size can be merged"),
        ("base", "absent/model", "`hf download absent/model` brings it there"),
        ("base", "./absent", "no directory './absent'"),
        ("base", "tuned1", "./tuned1 is listed twice"),
        ("adapter1", "tuned1", "./adapter1 is an adapter; give the model that it was trained on"),
    ],
)
def test_what_cannot_be_merged_is_said_and_nothing_is_written(
    tmp_path: Path, base: str, model: str, said: str
) -> None:
    done = run("init", base, "tuned1", model, "-o", tmp_path / "recipe.yml")
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_of_another_base_of_that_class_get_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) / 10)
    save_model(other, tmp_path, tasks=0)
    done = run("init", "base", "tuned1", tmp_path / "base", "-o", tmp_path / "recipe.yml")
    assert done.exit_code == 0
    (line,) = (line for line in done.stderr.splitlines() if "in common with the base" in line)
    assert f"{tmp_path}/base has little in common" in line
    assert f"# {line}" in (tmp_path / "recipe.yml").read_text().splitlines()


def test_a_name_of_the_hub_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    for name in ("base", "tuned1"):
        repo = cache / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        shutil.copytree(name, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    recipe = tmp_path / "recipe.yml"
    done = run("init", "org/base", "org/tuned1", "-o", recipe)
    assert done.exit_code == 0, done.output
    data = yaml.safe_load(recipe.read_text("utf-8"))
    assert (data["base_model"], data["models"][0]["model"]) == ("org/base", "org/tuned1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the recipe says next, offline
    for command in (["plan", recipe], ["merge", recipe, tmp_path / "merged"]):
        done = run(*command)
        assert done.exit_code == 0, done.output
    run("init", "base", "tuned1", "-o", tmp_path / "local.yml")
    expected = run("merge", tmp_path / "local.yml", tmp_path / "local")
    assert expected.exit_code == 0
    found, wanted = (tmp_path / name / "model.safetensors" for name in ("merged", "local"))
    assert found.read_bytes() == wanted.read_bytes()


def test_a_recipe_that_is_there_stays(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("mine")
    done = run("init", "base", "tuned1", "-o", recipe)
    assert (done.exit_code, recipe.read_text()) == (1, "mine")
    assert "--force" in done.stderr
    assert run("init", "base", "tuned1", "-o", recipe, "--force").exit_code == 0
    assert recipe.read_text() != "mine"


def test_without_arguments_the_program_says_what_to_do_next() -> None:
    done = run()
    assert done.exit_code == 0
    named = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  mergekit")]
    assert named == ["demo", "init", "plan", "merge", "doctor"]
