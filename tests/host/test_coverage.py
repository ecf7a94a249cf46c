"""No weight is lost in silence: what would be missing stops the merge before any work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from mergekit.architecture import json_definitions
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures import coverage, unused
from tests.host.classes import configuration
from tests.host.merging import merge, recipe, reload
from tests.host.models import Checkpoints, build, llama, save_family, save_model

BIASES = (
    "model.layers.*.mlp.down_proj.bias (2), model.layers.*.mlp.gate_proj.bias (2), "
    "model.layers.*.mlp.up_proj.bias (2), model.layers.*.self_attn.k_proj.bias (2), "
    "model.layers.*.self_attn.o_proj.bias (2), model.layers.*.self_attn.q_proj.bias (2), "
    "model.layers.*.self_attn.v_proj.bias (2)"
)


@pytest.fixture
def plain(tmp_path: Path) -> Checkpoints:
    return save_family("llama", tmp_path / "plain", tasks=2)


@pytest.fixture
def biased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    """A Llama with biases, and the host's own table, which does not know them."""
    name = "LlamaForCausalLM"
    monkeypatch.setitem(
        json_definitions.NAME_TO_ARCH, name, json_definitions._load_all_architectures()[1][name]
    )
    return save_family("llama-biased", tmp_path / "biased", tasks=2)


def edit(folder: Path, add: dict[str, str] | None = None, drop: str = "") -> None:
    """Copy tensors of a checkpoint to new names, and take one away."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {new: tensors[old].clone() for new, old in (add or {}).items()}
    tensors.pop(drop, None)
    save_file(tensors, file, metadata={"format": "pt"})


def check(config: dict[str, Any]) -> None:
    LoaderCache().loaders.clear()
    coverage.check_coverage(MergeConfiguration.model_validate(config), MergeOptions())


def test_whole_checkpoints_pass(plain: Checkpoints) -> None:
    check(recipe(plain))


def test_lost_weights_stop_mergekit_yaml_before_any_work(
    biased: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(STFError) as error:
        merge(recipe(biased), tmp_path / "out")
    assert str(error.value) == (
        f"{biased.base}: 14 weights would be missing from the merged model, because mergekit's "
        f"table of this architecture does not name them: {BIASES} (and weights of 2 more inputs). "
        "Merge with mergekit-pytorch, which goes by the names in the files, or set "
        "MERGEKIT_STF_ALLOW_LOSS=1 to do without them."
    )
    assert not (tmp_path / "out").exists()


def test_loss_is_a_warning_where_the_user_allows_it(
    biased: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(coverage.ALLOW_LOSS, "1")
    with caplog.at_level(logging.WARNING, "mergekit_stf.host.architectures.coverage"):
        merge(recipe(biased), tmp_path / "out")
    assert "14 weights would be missing" in caplog.text
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 21


def test_biases_survive_with_the_table_of_the_package(tmp_path: Path) -> None:
    checkpoints = save_family("llama-biased", tmp_path, tasks=1)
    merge(recipe(checkpoints), tmp_path / "out")
    base = load_file(checkpoints.base / "model.safetensors")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == base.keys()


def test_loss_in_a_tuned_model_alone_is_found(biased: Checkpoints, plain: Checkpoints) -> None:
    mixed = Checkpoints(plain.base, (plain.tuned[0], biased.tuned[1]))
    with pytest.raises(STFError, match=r"biased/tuned2: 14 weights would be missing"):
        check(recipe(mixed))


def test_tensors_that_the_class_does_not_read_are_not_missed(plain: Checkpoints) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder in (plain.base, *plain.tuned):
        edit(folder, {old: "model.norm.weight"})
    check(recipe(plain))


def test_every_name_counts_where_transformers_has_no_class(
    plain: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(plain.base, {"model.extra.weight": "model.norm.weight"})
    monkeypatch.setattr(coverage, "hollow_model", lambda settings: None)
    monkeypatch.setattr(unused, "parameter_names", lambda settings: None)
    with pytest.raises(STFError, match=r"base: 1 weights would be missing.*: model\.extra\.weight"):
        check(recipe(plain))


def test_copies_of_tied_weights_are_merged_with_them(tmp_path: Path) -> None:
    checkpoints = save_model(llama(tie_word_embeddings=True), tmp_path, tasks=2)
    edit(checkpoints.base, {"lm_head.weight": "model.embed_tokens.weight"})
    merge(recipe(checkpoints), tmp_path / "out")
    merged = reload(tmp_path / "out", transformers.LlamaForCausalLM)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])


def test_module_left_out_of_the_recipe_is_a_loss(tmp_path: Path) -> None:
    checkpoints = save_family("t5", tmp_path, tasks=1)
    config = recipe(checkpoints)
    models = config.pop("models")
    config["modules"] = {name: {"models": models} for name in ("decoder", "shared")}
    with pytest.raises(STFError, match=r"encoder\.block\.\*\.layer"):
        check(config)


def test_layers_left_out_by_slices_are_left_out_on_purpose(plain: Checkpoints) -> None:
    sources = [{"model": str(m), "layer_range": [0, 1]} for m in (plain.base, *plain.tuned)]
    config = recipe(plain, slices=[{"sources": sources}])
    config.pop("models")
    check(config)


def test_weight_that_a_model_lacks_stops_the_merge_before_any_work(
    plain: Checkpoints, tmp_path: Path
) -> None:
    edit(plain.tuned[0], drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(STFError, match=r"tuned1: 1 weights that the merge needs are not in the"):
        merge(recipe(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_optional_weight_that_one_model_lacks_stops_the_merge(
    biased: Checkpoints, plain: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the table of the package, where biases are optional
    mixed = Checkpoints(biased.base, (biased.tuned[0], plain.tuned[1]))
    with pytest.raises(STFError, match=r"plain/tuned2: 14 weights that the merge needs are not"):
        merge(recipe(mixed), tmp_path / "out")


def test_leftover_of_another_head_in_some_models_is_kept_or_dropped(tmp_path: Path) -> None:
    """A pooler, for which a token classifier has no use, as its pretraining left it."""
    model = build("BertForTokenClassification", configuration("BertForTokenClassification"))
    checkpoints = save_model(model, tmp_path, tasks=2)
    pooler = "bert.pooler.dense.weight"
    for folder in (checkpoints.base, checkpoints.tuned[1]):
        edit(folder, {pooler: "bert.encoder.layer.0.attention.self.query.weight"})
        merge(recipe(checkpoints), tmp_path / folder.name)
        assert pooler in load_file(tmp_path / folder.name / "model.safetensors")


def test_fused_experts_are_not_taken_for_absent(tmp_path: Path) -> None:
    check(recipe(save_family("mixtral", tmp_path, tasks=1)))


def test_guard_leaves_weights_and_plain_tensors_alone() -> None:
    coverage.guard_planning("stf", [0, 1], 0, "default.slices[0]")
    coverage.guard_planning("stf", ["no", "models"], "no", "model.norm.weight")
