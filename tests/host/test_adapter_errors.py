"""What cannot be merged in factors is refused, by name and with a way out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelPath
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters import patterns as adapter_patterns
from mergekit_stf.host.adapters.read import read_adapter
from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.merge import merge_recipe
from tests.host import peft_adapters as made
from tests.host.models import llama, mixtral, save_model
from tests.host.test_adapters import merged

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(llama(), tmp_path_factory.mktemp("llama"), tasks=0).base


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return made.save_adapter(base, tmp_path / "adapter", 1, target_modules=["q_proj"])


def configure(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refusal(adapter: Path) -> str:
    with pytest.raises(STFError) as caught:
        read_adapter(ModelPath(path=str(adapter)))
    message = str(caught.value)
    assert str(adapter) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_something_new": True}, "use_something_new"),
        ({"r": -1}, "r: "),
        ({"r": "many"}, "r: "),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"rank_pattern": {"(" * 90 + ")" * 90 + "{1000000}": 4}}, "repeats a part"),
        ({"alpha_pattern": {"((a{40}){40}){40}": 4}}, "repeats a part"),
        ({"target_modules": "q{1,99999}"}, "repeats a part"),
        ({"target_modules": "(" * 3000 + ")" * 3000}, "not a regular expression"),
        ({"exclude_modules": "q" * 20_000}, "20000 characters"),
        ({"lora_alpha": 1e300}, "model.layers.0.self_attn.q_proj: its update, 3.33e+299 B A"),
        ({"alpha_pattern": {"1.self_attn.q_proj": 1e60}}, "model.layers.1.self_attn.q_proj: its"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern.q_proj"),
        ({"r": 5}, "says rank 5"),
    ],
)
def test_settings(adapter: Path, settings: dict[str, Any], words: str) -> None:
    configure(adapter, **settings)
    assert words in refusal(adapter)


def test_pattern_that_backtracks_without_end(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_patterns, "PATIENCE", 0.05)
    for key in ("rank_pattern", "alpha_pattern"):
        configure(adapter, rank_pattern={}, alpha_pattern={})
        configure(adapter, **{key: {r"(.|.|.)*\d": 3}})
        assert "takes too long" in refusal(adapter)


def test_settings_of_other_versions_of_peft(adapter: Path) -> None:
    before = read_adapter(ModelPath(path=str(adapter)))
    configure(adapter, rank_pattern=None, alpha_pattern=None, merge_weights=False, enable_lora=None)
    after = read_adapter(ModelPath(path=str(adapter)))
    for name, update in before.updates.items():
        assert torch.equal(update.factors.left, after.updates[name].factors.left)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[Q + "A.weight"].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.pop(Q + "A.weight"), "needs ['A', 'B']"),
        (lambda t: rename(t, Q + "A.weight", "some.name"), "not a name of PEFT"),
        (lambda t: rename(t, Q + "A.weight", Q + "magnitude_vector"), "magnitude_vector"),
        (lambda t: t.update({Q + "A.weight": torch.ones(3, 16, 1, 1)}), "only linear layers"),
    ],
)
def test_tensors(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any], words: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    assert words in refusal(adapter)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.complex64]
)
def test_types(adapter: Path, dtype: torch.dtype) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t.to(dtype) if "lora_A" in k else t for k, t in tensors.items()}, file)
    assert f"is stored as {dtype}" in refusal(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipes_are_no_files(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    assert name in refusal(adapter)


def test_full_copies_are_refused_alike(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The way through PEFT looks at patterns, sizes and types before PEFT does."""
    content = made.recipe(base, [f"{base}+{adapter}"])
    recipe = check_recipe(made.yaml.safe_dump(content))
    for settings, words in (
        ({"rank_pattern": {"(" * 90 + ")" * 90 + "{1000000}": 4}}, "repeats a part"),
        ({"rank_pattern": {}, "lora_alpha": 1e300}, "q_proj: its update"),
        ({"lora_alpha": 8, "peft_type": "NO_SUCH"}, "PEFT cannot put this adapter on its base"),
    ):
        configure(adapter, **settings)
        with pytest.raises(STFError, match=words):
            merge_recipe(recipe, tmp_path / "out", MergeOptions(quiet=True))
        assert not (tmp_path / "out").exists()


def test_files(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert "not a safetensors file" in refusal(adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "save the adapter again as safetensors" in refusal(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "is no adapter" in refusal(adapter)


def problem(content: dict[str, Any], out: Path, **options: Any) -> str:
    with pytest.raises(STFError) as caught:
        merged(content, out, **options)
    assert not out.exists() or not (out / "config.json").exists()
    assert not out.with_name("out.stf-work").exists()
    return str(caught.value)


def test_recipes(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, one = tmp_path / "out", f"{base}+{adapter}"
    full = made.save_full(base, adapter, tmp_path / "full")
    assert "is a full model" in problem(made.recipe(base, [one, str(full)]), out)
    assert "same one" in problem(made.recipe(full, [one]), out)
    assert "without an adapter" in problem(
        made.recipe(base, [f"{base}+{full}"]) | {"base_model": one}, out
    )
    assert "tokenizer" in problem(made.recipe(base, [one], tokenizer_source="union"), out)
    ties = made.recipe(base, [one]) | {"merge_method": "task_arithmetic"}
    ties["models"][0]["parameters"] = {"weight": 1.0}
    assert "'task_arithmetic'" in problem(ties, out)
    slices = made.recipe(base, []) | {
        "slices": [{"sources": [{"model": m, "layer_range": [0, 2]} for m in (str(base), one)]}]
    }
    del slices["models"]
    assert "slices" in problem(slices, out)


def test_weights_that_the_base_has_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    deeper = save_model(llama(num_hidden_layers=3), tmp_path / "deeper", tasks=0).base
    other = made.save_adapter(deeper, tmp_path / "other", 1, target_modules=["q_proj"])
    message = problem(made.recipe(base, [f"{base}+{other}"]), tmp_path / "out")
    assert "model.layers.2.self_attn.q_proj.weight" in message
    tied = save_model(llama(tie_word_embeddings=True), tmp_path / "tied", tasks=0).base
    other = made.save_adapter(tied, tmp_path / "head", 1, target_modules=["lm_head"])
    assert "tied weights" in problem(made.recipe(tied, [f"{tied}+{other}"]), tmp_path / "out")
    wider = save_model(llama(hidden_size=32), tmp_path / "wider", tasks=0).base
    other = made.save_adapter(wider, tmp_path / "another", 1, target_modules=["q_proj"])
    assert "(32, 32)" in problem(made.recipe(base, [f"{base}+{other}"]), tmp_path / "out")


def test_experts_of_a_fused_stack(tmp_path: Path) -> None:
    base = save_model(mixtral(), tmp_path, tasks=0).base
    adapter = made.save_adapter(base, tmp_path / "adapter", 1, target_modules=["q_proj"])
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    factors = {"A": torch.ones(3, 16), "B": torch.ones(24, 3)}
    stored = {f"base_model.model.{expert}.lora_{k}.weight": v for k, v in factors.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    message = problem(made.recipe(base, [f"{base}+{adapter}"]), tmp_path / "out")
    assert expert in message
    assert "stack of experts" in message


def test_updates_that_no_adapter_holds(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trimmed = made.recipe(base, [f"{base}+{adapter}"], parameters={"density": 0.5})
    assert "density below 1" in problem(trimmed, out, adapter=True)
    assert merged(trimmed, out, adapter=True, max_rank=8).modules[0].dropped > 0
    norms = made.save_adapter(
        base, tmp_path / "n", 1, target_modules=["q_proj"], modules_to_save=["input_layernorm"]
    )
    message = problem(made.recipe(base, [f"{base}+{norms}"]), tmp_path / "out2", adapter=True)
    assert "input_layernorm" in message


def test_untrained_adapters_change_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    zero = {k: v * 0 if ".lora_B." in k else v for k, v in load_file(file).items()}
    save_file(zero, file)
    content = made.recipe(base, [f"{base}+{adapter}"])
    assert "changes nothing" in problem(content, tmp_path / "out", adapter=True)
    merged(content, tmp_path / "model")
    before, after = made.tensors(base), made.tensors(tmp_path / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_output_is_never_overwritten(base: Path, adapter: Path) -> None:
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(STFError, match="there already"):
        merged(made.recipe(base, [f"{base}+{adapter}"]), base)
    assert sorted(path.name for path in base.iterdir()) == before
