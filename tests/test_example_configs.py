"""Every example recipe: its keys, and a merge with its models replaced by tiny ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click import Command
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mergekit_stf.core import methods
from mergekit_stf.host.recipe.recipe import check_recipe
from tests.environments import ROOT
from tests.host.models import VOCABULARY, save_family
from tests.host.peft_adapters import GPT2_LINEAR, on_base, save_adapter

RECIPES = sorted((ROOT / "example_configs").glob("*.yml"))
RAW = "raw_checkpoints"
FAMILIES = {"t5": "t5", "vit_b32": "clip-vision", "vit_l14": "clip-vision", "gpt2_lora": "gpt2"}
OF_OTHER_METHODS = {"normalize", "int8_mask"}


def names(recipes: list[Path]) -> list[str]:
    return [path.stem for path in recipes]


def read(name: str) -> str:
    return (ROOT / "example_configs" / f"{name}.yml").read_text("utf-8")


def parameters(recipe: dict[str, Any]) -> Iterator[str]:
    yield from recipe.get("parameters", {})
    for entry in recipe["models"]:
        yield from entry.get("parameters", {})


@pytest.mark.parametrize("name", names(RECIPES))
def test_the_first_lines_say_when_and_how(name: str) -> None:
    first, second, *_ = read(name).splitlines()
    assert first.startswith("# Use when ")
    program = "mergekit-pytorch" if name == RAW else "mergekit-yaml"
    assert second.startswith(f"# {program} {name}.yml merged/")


@pytest.mark.parametrize("name", names(RECIPES))
def test_every_parameter_is_one_of_the_method(name: str) -> None:
    recipe = yaml.safe_load(read(name))
    method = recipe["merge_method"]
    known = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    foreign = OF_OTHER_METHODS if name == "from_ties" else set()
    assert set(parameters(recipe)) <= (known - OF_OTHER_METHODS) | foreign
    assert method in methods.names()
    assert (name == method) is (method != "stf")


def test_the_values_are_those_of_the_paper() -> None:
    expected = {
        "t5": (0.2, 0.8),
        "vit_b32": (0.2, 0.6),
        "vit_l14": (0.2, 0.7),
        "gpt2_lora": (0.3, 0.5),
        "llama2_7b": (1.0, 0.8),
    }
    found = {name: yaml.safe_load(read(name))["parameters"] for name in expected}
    assert {name: (p["density"], p["lambda"]) for name, p in found.items()} == expected


def add_tokenizers(base: Path, tuned: tuple[Path, ...]) -> None:
    """Give each model a tokenizer, and the second one a token more than the others have."""
    words = {word: i for i, word in enumerate(("[UNK]", *map(str, range(1, VOCABULARY))))}
    for folder in (base, *tuned):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
        )
        if folder == tuned[1]:
            tokenizer.add_tokens("[PAD]")
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def tiny(name: str, count: int, root: Path) -> tuple[str, list[str]]:
    """Make tiny models for a recipe; return the references of its base and of its models."""
    made = save_family(FAMILIES.get(name, "llama"), root, tasks=max(count, 2))
    if name == "gpt2_lora":
        adapters = [
            save_adapter(made.base, root / f"adapter{i}", i, target_modules=GPT2_LINEAR)
            for i in range(count)
        ]
        return str(made.base), on_base(made.base, adapters)
    if name == RAW:
        for folder in (made.base, *made.tuned):
            shutil.copy(folder / "model.safetensors", folder.with_suffix(".safetensors"))
        files = [str(folder.with_suffix(".safetensors")) for folder in (made.base, *made.tuned)]
        return files[0], files[1 : count + 1]
    if name not in FAMILIES:
        add_tokenizers(made.base, made.tuned)
    return str(made.base), [str(folder) for folder in made.tuned[:count]]


def replaced(text: str, root: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe with the names of its models replaced by tiny ones, as text and data."""
    recipe = yaml.safe_load(text)
    published = [e["model"] for e in recipe["models"] if e["model"] != recipe["base_model"]]
    base, models = tiny(name, len(published), root)
    for old, new in sorted(zip(published, models, strict=True), key=lambda pair: -len(pair[0])):
        text = text.replace(f"model: {old}\n", f"model: {new}\n")
    text = text.replace(f"model: {recipe['base_model']}\n", f"model: {base}\n")
    return text, yaml.safe_load(text)


def merge(main: Command, text: str, out: Path, *options: str) -> dict[str, torch.Tensor]:
    path = out.with_suffix(".yml")
    path.write_text(text, "utf-8")
    outcome = CliRunner().invoke(main, [str(path), str(out), *options], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    files = list(out.glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


OPTIONS: dict[str, Callable[[Path], list[str]]] = {
    "gpt2_lora": lambda root: ["--lora-merge-dtype", "float32", "--lora-merge-cache", str(root)],
    "low_memory_gpu": lambda root: ["--lazy-unpickle", "--out-shard-size", "1B"],
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("name", names(RECIPES))
def test_the_recipe_runs(name: str, tmp_path: Path) -> None:
    text, recipe = replaced(read(name), tmp_path, name)
    if name == RAW:
        unknown = set(recipe) - set(RawPyTorchMergeConfig.model_fields)
        main, warnings = mergekit_pytorch, ()
    else:
        unknown = set()
        main, warnings = mergekit_yaml, check_recipe(text).warnings
    assert unknown == set()
    assert len(warnings) == (len(OF_OTHER_METHODS) if name == "from_ties" else 0)

    merged = merge(main, text, tmp_path / "merged", *OPTIONS.get(name, lambda _: [])(tmp_path))
    base_path = Path(recipe["base_model"])
    base = load_file(base_path if name == RAW else base_path / "model.safetensors")
    assert set(merged) == set(base)
    changed = {key for key in base if not torch.equal(merged[key], base[key].to(merged[key].dtype))}
    assert any("mlp" in key or "DenseReluDense" in key for key in changed)
    if name == "filter_rule":
        assert not any("self_attn" in key for key in changed)
