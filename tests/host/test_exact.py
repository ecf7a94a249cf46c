"""Names of weights from the class in transformers and one configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mergekit_stf.host.architectures.exact import ExactArchitecture, weights_of
from mergekit_stf.host.architectures.loading import ParameterNames, hollow_model
from tests.host.classes import configuration, meta_model
from tests.host.merging import merge, recipe
from tests.host.models import Checkpoints, build, save_model

EXACT = ExactArchitecture()


def layer(label: str, index: int) -> set[str]:
    return {info.name for info in EXACT.layer_weights(index, configuration(label))}


def test_layers_of_a_mixture_differ() -> None:
    label = "DeepseekV3ForCausalLM:dense first"
    assert EXACT.num_layers(configuration(label)) == 2
    assert "model.layers.0.mlp.gate_proj.weight" in layer(label, 0)
    assert "model.layers.1.mlp.experts.gate_up_proj" in layer(label, 1)
    assert "model.layers.1.mlp.gate_proj.weight" not in layer(label, 1)


def test_weights_outside_of_the_layers_come_first() -> None:
    config = configuration("StableLmForCausalLM")
    names = [info.name for info in EXACT.all_weights(config)]
    before = [info.name for info in EXACT.pre_weights(config)]
    assert names[: len(before)] == before
    assert set(before) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.norm.bias",
        "lm_head.weight",
    }


def test_renamed_weight_goes_by_its_stored_name() -> None:
    infos = {info.name: info for info in weights_of(meta_model("ViTForImageClassification"))}
    query = infos["vit.encoder.layer.0.attention.attention.query.weight"]
    assert "vit.layers.0.attention.q_proj.weight" in (query.aliases or ())


def test_tied_weight_is_stored_once() -> None:
    infos = {info.name: info for info in weights_of(meta_model("LlamaForCausalLM:tied"))}
    assert infos["model.embed_tokens.weight"].tied_names == ("lm_head.weight",)
    assert "lm_head.weight" not in infos


def names_of(label: str) -> ParameterNames:
    return ParameterNames(meta_model(label))


def test_stored_experts_fill_the_fused_parameter() -> None:
    names = names_of("MixtralForCausalLM")
    stack = "model.layers.0.mlp.experts"
    for stored, parameter in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
        source = f"model.layers.0.block_sparse_moe.experts.3.{stored}.weight"
        assert names.of(source) == {f"{stack}.{parameter}"}


def test_tied_copy_fills_the_parameter_that_it_is_tied_to() -> None:
    assert names_of("LlamaForCausalLM:tied").of("lm_head.weight") == {"model.embed_tokens.weight"}
    assert names_of("LlamaForCausalLM").of("lm_head.weight") == {"lm_head.weight"}


def test_prefix_of_the_bare_model_may_be_missing() -> None:
    assert names_of("GPT2LMHeadModel").of("wte.weight") == {"transformer.wte.weight"}


def test_name_without_a_parameter_fills_nothing() -> None:
    assert names_of("LlamaForCausalLM").of("model.layers.0.rotary_emb.inv_freq") == set()


def test_class_that_transformers_lacks_has_no_model() -> None:
    config = configuration("LlamaForCausalLM")
    config.architectures = ["BaichuanForCausalLM"]
    assert hollow_model(config) is None


def test_slices_of_an_exact_architecture(tmp_path: Path) -> None:
    """Slices over all layers are the merge of whole models, and a gradient reaches each layer."""
    model = build("StableLmForCausalLM", configuration("StableLmForCausalLM"))
    checkpoints = save_model(model, tmp_path, tasks=1)
    outs = []
    for name, key in (("models", "models"), ("slices", "slices")):
        merge(stepped(checkpoints, key), tmp_path / name)
        outs.append(load_file(tmp_path / name / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys()
    assert all(outs[0][name].equal(outs[1][name]) for name in outs[0])
    base, tuned = (
        load_file(f / "model.safetensors") for f in (checkpoints.base, checkpoints.tuned[0])
    )
    bias = "model.layers.{}.input_layernorm.bias"
    assert outs[0][bias.format(0)].equal(base[bias.format(0)])
    torch.testing.assert_close(outs[0][bias.format(1)], tuned[bias.format(1)])


def stepped(checkpoints: Checkpoints, key: str) -> dict[str, object]:
    """Return a recipe whose weight goes from 0 in the first layer to 1 in the last."""
    gradient = {"weight": [0.0, 1.0]}
    config = recipe(checkpoints)
    config.pop("models")
    if key == "models":
        return config | {"models": [{"model": str(checkpoints.tuned[0]), "parameters": gradient}]}
    sources = [
        {"model": str(checkpoints.base), "layer_range": [0, 2]},
        {"model": str(checkpoints.tuned[0]), "layer_range": [0, 2], "parameters": gradient},
    ]
    return config | {"slices": [{"sources": sources}]}
