"""Tensors for which the base's class has no use are merged or copied, and never lost in silence."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.cli.merges import run, write_recipe
from tests.host.merging import State, expected, merge, recipe, relative_error
from tests.host.models import TEXT, Checkpoints, build, save_model
from tests.host.test_checkpoints import with_vocabularies
from tests.rules import rule_for

MIXTURE = TEXT | {
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


def qwen3_5() -> PreTrainedModel:
    linear = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")}
    heads = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    config = transformers.Qwen3_5TextConfig(**TEXT, **linear, **heads, head_dim=8)
    return build("Qwen3_5ForCausalLM", config)


def glm4_moe(**more: int) -> PreTrainedModel:
    config = transformers.Glm4MoeConfig(**(MIXTURE | more), head_dim=8)
    return build("Glm4MoeForCausalLM", config)


def deepseek_v3() -> PreTrainedModel:
    ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8)
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1}
    config = transformers.DeepseekV3Config(**MIXTURE, **ranks, **heads)
    return build("DeepseekV3ForCausalLM", config)


FAMILIES = {
    "qwen3_5": (qwen3_5, "mtp.layers.0."),
    "glm4_moe": (glm4_moe, "model.layers.2."),
    "deepseek_v3": (deepseek_v3, "model.layers.2."),
}
SHAPES = {
    "eh_proj.weight": (16, 32),
    "enorm.weight": (16,),
    "self_attn.q_proj.weight": (16, 16),
    "mlp.experts.0.up_proj.weight": (12, 16),
    "mlp.experts.1.up_proj.weight": (12, 16),
    "shared_head.head.weight": (40, 16),
}


def add(folder: Path, more: State) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})


def ahead(prefix: str, seed: int) -> State:
    """Return the tensors of a layer that predicts the token after the next, near those of 0."""
    states = []
    for one in (0, seed):
        generator = torch.Generator().manual_seed(one)
        states.append({n: torch.randn(s, generator=generator) for n, s in SHAPES.items()})
    return {prefix + n: states[0][n] + 0.02 * states[1][n] for n in SHAPES}


def save(family: str, root: Path) -> Checkpoints:
    make, prefix = FAMILIES[family]
    checkpoints = save_model(make(), root, tasks=2)
    for seed, folder in enumerate((checkpoints.base, *checkpoints.tuned)):
        add(folder, ahead(prefix, seed))
    return checkpoints


def stored(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tool", ["mergekit-yaml", "mergekit-stf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_predict_ahead_are_merged_like_the_rest(
    family: str, tool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, prefix = save(family, tmp_path), FAMILIES[family][1]
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING, "mergekit_stf"):
        if tool == "mergekit-yaml":
            merge(recipe(checkpoints), out)
        else:
            file = write_recipe(tmp_path / "r.yml", checkpoints, **{"lambda": 0.8})
            assert run("merge", file, out).exit_code == 0
    merged = stored(out)
    base, *tuned = (stored(folder) for folder in (checkpoints.base, *checkpoints.tuned))
    names = [prefix + name for name in SHAPES]
    rules = {name: rule_for(name, base[name].shape, None) for name in names}
    rules[f"{prefix}shared_head.head.weight"] = "sum"
    wanted = expected({name: base[name] for name in names}, tuned, rules, 1.0)
    for name in names:
        assert relative_error(merged[name], wanted[name], base[name]) < 1e-5, name
    (said,) = [r.getMessage() for r in caplog.records if "does not use" in r.getMessage()]
    assert "6 are merged like the rest: " in said
    assert "eh_proj.weight (1)" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_model_lacks_is_copied_from_the_base(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``save_pretrained`` drops such layers, so the second model has none; the first has one."""
    make, prefix = FAMILIES[family]
    checkpoints = save_model(make(), tmp_path, tasks=2)
    for seed, folder in enumerate((checkpoints.base, checkpoints.tuned[0])):
        add(folder, ahead(prefix, seed))
    with caplog.at_level(logging.WARNING, "mergekit_stf"):
        merge(recipe(checkpoints), tmp_path / "out")
    base, merged = stored(checkpoints.base), stored(tmp_path / "out")
    assert all(merged[prefix + name].equal(base[prefix + name]) for name in SHAPES)
    assert not merged["model.norm.weight"].equal(base["model.norm.weight"])
    (said,) = [r.getMessage() for r in caplog.records if "does not use" in r.getMessage()]
    assert "6 are copied from the base, because not every model has them" in said


def test_tensor_of_whole_numbers_is_copied(tmp_path: Path) -> None:
    checkpoints = save("qwen3_5", tmp_path)
    for seed, folder in enumerate((checkpoints.base, *checkpoints.tuned)):
        add(folder, {"mtp.order": torch.tensor([seed, 7])})
    merge(recipe(checkpoints), tmp_path / "out")
    assert stored(tmp_path / "out")["mtp.order"].tolist() == [0, 7]


def test_plan_says_it_once_and_probes_what_all_models_have(tmp_path: Path) -> None:
    checkpoints = save("glm4_moe", tmp_path)
    file = checkpoints.tuned[1] / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith("model.layers.2.eh")}
    save_file(kept, file, metadata={"format": "pt"})
    done = run("plan", write_recipe(tmp_path / "r.yml", checkpoints), "--probe", "99")
    assert done.exit_code == 0, done.output
    assert done.output.count("does not use") == 1
    assert re.search(
        r"5 are merged like .*; 1 are copied from .*eh_proj\.weight \(1\)$", done.output, re.M
    )


def test_rows_of_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    checkpoints = with_vocabularies(tmp_path)
    for folder in (checkpoints.base, *checkpoints.tuned):
        add(folder, {"mtp.embed_tokens.weight": stored(folder)["model.embed_tokens.weight"]})
    merge(recipe(checkpoints, tokenizer_source="union"), tmp_path / "out")
    merged = stored(tmp_path / "out")
    assert merged["mtp.embed_tokens.weight"].equal(merged["model.embed_tokens.weight"])


def sliced(checkpoints: Checkpoints, layers: list[int]) -> dict[str, object]:
    folders = (checkpoints.base, *checkpoints.tuned)
    config = recipe(checkpoints)
    config.pop("models")
    slices = [
        {"sources": [{"model": str(f), "layer_range": [n, n + 1]} for f in folders]} for n in layers
    ]
    return config | {"slices": slices}


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 1], [1]])
def test_layer_whose_number_slices_give_away_is_left_out(
    layers: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save_model(glm4_moe(first_k_dense_replace=0), tmp_path, tasks=2)
    for folder in (checkpoints.base, *checkpoints.tuned):
        add(folder, ahead("model.layers.2.", 0) | {"mtp.scale": torch.ones(3)})
    with caplog.at_level(logging.WARNING, "mergekit_stf"):
        merge(sliced(checkpoints, layers), tmp_path / "out")
    merged = stored(tmp_path / "out")
    assert "mtp.scale" in merged
    assert ("model.layers.2.eh_proj.weight" in merged) is (len(layers) == 2)
    assert ("6 are left out, because the recipe's slices" in caplog.text) is (len(layers) != 2)


def test_tables_that_the_class_computes_are_not_carried_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save("qwen3_5", tmp_path)
    for folder in (checkpoints.base, *checkpoints.tuned):
        add(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    merge(recipe(checkpoints), tmp_path / "out")
    assert not [name for name in stored(tmp_path / "out") if "inv_freq" in name]


@pytest.mark.parametrize("first", ["mergekit.merge", "mergekit.plan", "mergekit_stf"])
def test_the_host_asks_us_whatever_is_imported_first(first: str) -> None:
    code = (
        f"import {first}, mergekit_stf, mergekit.merge; "
        "print(mergekit.merge.get_architecture_info.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mergekit_stf.host.architectures.all_weights"]
