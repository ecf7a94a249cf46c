"""Files, types and vocabularies of checkpoints, as they come: the merge is the same by value."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.moe import main as mergekit_moe
from mergekit.scripts.multimerge import main as mergekit_multi
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.host.merging import (
    expected,
    merge,
    parameters,
    recipe,
    relative_error,
    reload,
    rules_of,
    worst_error,
)
from tests.host.models import LAYOUTS, Checkpoints, lay_out, llama, mixtral, perturb, save_model

LLAMA = transformers.LlamaForCausalLM


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_model(llama(), tmp_path_factory.mktemp("plain"), tasks=2)


@pytest.fixture(scope="module")
def merged(plain: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("merged") / "out"
    merge(recipe(plain), out)
    return load_file(out / "model.safetensors")


def copies(plain: Checkpoints, root: Path) -> Checkpoints:
    """Save the same models under another folder, for a test to change."""
    folders = []
    for folder in (plain.base, *plain.tuned):
        reload(folder, LLAMA).save_pretrained(root / folder.name)
        folders.append(root / folder.name)
    return Checkpoints(folders[0], tuple(folders[1:]))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(found[n].equal(wanted[n]) for n in wanted)


def test_pickled_checkpoints(
    plain: Checkpoints, merged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pickled = copies(plain, tmp_path)
    for folder in (pickled.base, pickled.tuned[1]):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    merge(recipe(pickled), tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), merged)


@pytest.mark.parametrize("stored", LAYOUTS)
def test_sharded_checkpoints(
    stored: str, plain: Checkpoints, merged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sharded = copies(plain, tmp_path)
    for folder in (sharded.base, sharded.tuned[0]):
        lay_out(folder, stored)
    merge(recipe(sharded), tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), merged)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_mixed_types_are_merged_in_the_wider_one(
    half: torch.dtype, plain: Checkpoints, tmp_path: Path
) -> None:
    mixed = copies(plain, tmp_path)
    reload(plain.tuned[0], LLAMA).to(half).save_pretrained(mixed.tuned[0])
    merge(recipe(mixed, dtype="float32"), tmp_path / "out")
    states = [parameters(folder, LLAMA) for folder in (mixed.base, *mixed.tuned)]
    wanted = expected(states[0], states[1:], rules_of(reload(mixed.base, LLAMA)), 1.0)
    found = load_file(tmp_path / "out" / "model.safetensors")
    errors = {n: relative_error(found[n], wanted[n], states[0][n]) for n in wanted}
    assert max(errors.values()) < 1e-5


def test_output_type_rounds_once(
    plain: Checkpoints, merged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    merge(recipe(plain, dtype="float32", out_dtype="bfloat16"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same(found, {name: tensor.bfloat16() for name, tensor in merged.items()})


def test_recipe_that_rounds_its_inputs_says_so(
    plain: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = copies(plain, tmp_path)
    with caplog.at_level(logging.WARNING, "mergekit_stf"):
        merge(recipe(fresh, dtype="bfloat16"), tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "rounds" in record.getMessage()]
    assert len(said) == 3
    assert f"`dtype: bfloat16` rounds {fresh.base}, stored in float32, before" in "\n".join(said)
    assert "write `dtype: float32` and `out_dtype: bfloat16` instead" in said[0]


def test_recipe_that_keeps_precision_says_nothing(
    plain: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = copies(plain, tmp_path)
    with caplog.at_level(logging.WARNING, "mergekit_stf"):
        merge(recipe(fresh, dtype="float32", out_dtype="bfloat16"), tmp_path / "out")
    assert not [record for record in caplog.records if "rounds" in record.getMessage()]


def test_fused_and_separate_experts_give_the_same_merge(tmp_path: Path) -> None:
    model, outputs = mixtral(), []
    for fused in (False, True):
        root = tmp_path / str(fused)
        for seed in range(3):
            tuned = perturb(model, seed) if seed else model
            tuned.save_pretrained(root / str(seed), save_original_format=not fused)
        names = load_file(root / "0" / "model.safetensors").keys()
        assert any(name.endswith("experts.gate_up_proj") for name in names) is fused
        checkpoints = Checkpoints(root / "0", (root / "1", root / "2"))
        merge(recipe(checkpoints, density=0.5), root / "out")
        outputs.append(parameters(root / "out", transformers.MixtralForCausalLM))
    assert same(*outputs)


WORDS = [f"w{i}" for i in range(40)]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    level = WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), unk_token="w0")


def with_vocabularies(root: Path) -> Checkpoints:
    """Save a base of 40 words and two models: one has two words more, one the same in reverse."""
    base = llama()
    longer = perturb(base, 1)
    longer.resize_token_embeddings(42, mean_resizing=False)
    backwards = perturb(base, 2)
    models = [(base, WORDS), (longer, [*WORDS, "x", "y"]), (backwards, WORDS[::-1])]
    folders = [root / name for name in ("base", "tuned1", "tuned2")]
    for folder, (model, words) in zip(folders, models, strict=True):
        model.save_pretrained(folder)
        tokenizer(words).save_pretrained(folder)
    return Checkpoints(folders[0], tuple(folders[1:]))


@pytest.mark.parametrize("source", ["union", "base"])
def test_vocabularies_are_aligned_before_their_rows_are_summed(source: str, tmp_path: Path) -> None:
    checkpoints = with_vocabularies(tmp_path)
    merge(recipe(checkpoints, tokenizer_source=source), tmp_path / "out")
    name = "model.embed_tokens.weight"
    merged = load_file(tmp_path / "out" / "model.safetensors")[name].double()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    base, longer, backwards = (
        load_file(folder / "model.safetensors")[name].double()
        for folder in (checkpoints.base, *checkpoints.tuned)
    )
    assert len(merged) == len(words) == (42 if source == "union" else 40)
    for i, word in enumerate(WORDS):
        delta = longer[i] - base[i] + backwards[39 - i] - base[i]
        torch.testing.assert_close(merged[words[word]], base[i] + 0.8 * delta, rtol=0, atol=1e-6)
    for i, word in enumerate(["x", "y"] if source == "union" else []):
        torch.testing.assert_close(merged[words[word]], longer[40 + i], rtol=0, atol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(words)


def test_step_of_a_multi_merge(plain: Checkpoints, tmp_path: Path) -> None:
    """A merge of merges with ``mergekit-multi`` is the two merges one after the other."""
    inner: dict[str, Any] = recipe(plain) | {"name": "inner"}
    models = [{"model": "inner"}, {"model": str(plain.tuned[0])}]
    outer = recipe(plain) | {"models": models}
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([inner, outer]))
    LoaderCache().loaders.clear()
    arguments = [str(file), "--intermediate-dir", str(tmp_path / "steps"), "--quiet"]
    arguments += ["--out-path", str(tmp_path / "out"), "--no-copy-tokenizer"]
    CliRunner().invoke(mergekit_multi, arguments, catch_exceptions=False, standalone_mode=False)
    stages = Checkpoints(plain.base, (tmp_path / "steps" / "inner", plain.tuned[0]))
    error, name = worst_error(stages, tmp_path / "out", 1.0)
    assert error < 1e-5, name


def test_experts_of_a_mixture_may_come_from_a_merge(plain: Checkpoints, tmp_path: Path) -> None:
    """``mergekit-moe`` puts a merged model among its experts as it does any other."""
    merge(recipe(plain), tmp_path / "merged")
    tokenizer(WORDS).save_pretrained(tmp_path / "merged")
    sources = [tmp_path / "merged", plain.tuned[0]]
    config = {
        "base_model": str(tmp_path / "merged"),
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [{"source_model": str(source), "positive_prompts": [""]} for source in sources],
    }
    file = tmp_path / "moe.yml"
    file.write_text(yaml.safe_dump(config))
    LoaderCache().loaders.clear()
    arguments = [str(file), str(tmp_path / "out"), "--quiet"]
    CliRunner().invoke(mergekit_moe, arguments, catch_exceptions=False, standalone_mode=False)
    mixture = load_file(tmp_path / "out" / "model.safetensors")
    for expert, source in enumerate(sources):
        stored = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
        assert mixture["model.layers.1.mlp.experts.down_proj"][expert].equal(stored)
