"""Quantised inputs are dequantised on read, or refused by name before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.dequantised import apply_scales
from tests.cli.merges import run, write_recipe
from tests.host.merging import merge, recipe, reload
from tests.host.models import TEXT, Checkpoints, build, llama, qwen3_moe, save_model
from tests.host.peft_adapters import save_adapter
from tests.host.quantising import copies, fp8, mxfp4, settings

STATE = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def gpt_oss() -> PreTrainedModel:
    sizes = TEXT | {"hidden_size": 32, "intermediate_size": 32}
    config = transformers.GptOssConfig(**sizes, head_dim=16, num_local_experts=4)
    return build("GptOssForCausalLM", config)


def deepseek_v3() -> PreTrainedModel:
    mixture = {"n_routed_experts": 4, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
    ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8)
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1}
    more = mixture | ranks | heads | {"num_experts_per_tok": 2}
    return build("DeepseekV3ForCausalLM", transformers.DeepseekV3Config(**TEXT, **more))


BLOCKS = FP8 | {"weight_block_size": [16, 10]}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt-oss in mxfp4": (gpt_oss, mxfp4, {"quant_method": "mxfp4"}),
    "llama in blocks of fp8": (llama, fp8(16, 10), BLOCKS),
    "experts in blocks of fp8": (qwen3_moe, fp8(16, 10), BLOCKS),
    "deepseek in blocks of fp8": (deepseek_v3, fp8(16, 10), BLOCKS),
    "llama with a scale a row": (llama, fp8(1, 24, "_scale"), {"quant_method": "fbgemm_fp8"}),
    "llama with a scale a weight": (
        llama,
        fp8(99, 99, "_scale"),
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
}


def both(case: str, root: Path) -> tuple[Checkpoints, Checkpoints]:
    """Return quantised checkpoints, and the same numbers unquantised."""
    make, pack, quantisation = CASES[case]
    checkpoints = save_model(make(), root, tasks=2)
    pairs = [copies(f, pack, **quantisation) for f in (checkpoints.base, *checkpoints.tuned)]
    packed, plain = zip(*pairs, strict=True)
    return Checkpoints(packed[0], packed[1:]), Checkpoints(plain[0], plain[1:])


def written(folder: Path) -> STATE:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_merge_of_quantised_checkpoints_is_that_of_their_numbers(case: str, tmp_path: Path) -> None:
    outs = []
    for name, checkpoints in zip(("packed", "plain"), both(case, tmp_path), strict=True):
        done = run("merge", write_recipe(tmp_path / f"{name}.yml", checkpoints), tmp_path / name)
        assert done.exit_code == 0, done.output
        outs.append(written(tmp_path / name))
    assert outs[0].keys() == outs[1].keys()
    for name, tensor in outs[1].items():
        torch.testing.assert_close(outs[0][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "quantization_config" not in saved
    reload(tmp_path / "packed", getattr(transformers, saved["architectures"][0]))


def test_plan_and_sweep_read_quantised_checkpoints(tmp_path: Path) -> None:
    packed, plain = both("gpt-oss in mxfp4", tmp_path)
    file = write_recipe(tmp_path / "r.yml", packed)
    plan = run("plan", file, "--probe", "--json")
    assert plan.exit_code == 0, plan.output
    swept = run("sweep", file, tmp_path / "sweep", "--lambda", "0.5")
    assert swept.exit_code == 0, swept.output
    merge(recipe(plain, parameters={"lambda": 0.5}), tmp_path / "out")
    found, wanted = written(tmp_path / "sweep" / "lambda-0.5"), written(tmp_path / "out")
    name = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_adapters_are_merged_into_a_quantised_base(tmp_path: Path) -> None:
    outs = []
    for checkpoints in both("llama in blocks of fp8", tmp_path)[::-1]:
        if not outs:
            adapters = [
                save_adapter(checkpoints.base, tmp_path / f"a{n}", n, target_modules=["q_proj"])
                for n in (1, 2)
            ]
        models = Checkpoints(
            checkpoints.base, tuple(Path(f"{checkpoints.base}+{a}") for a in adapters)
        )
        out = tmp_path / f"out{len(outs)}"
        done = run("lora", write_recipe(tmp_path / "r.yml", models), out)
        assert done.exit_code == 0, done.output
        outs.append(written(out))
    assert outs[0].keys() == outs[1].keys()
    for name, tensor in outs[0].items():
        torch.testing.assert_close(outs[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_mergekit_yaml_names_the_command_that_dequantises(tmp_path: Path) -> None:
    packed, _ = both("gpt-oss in mxfp4", tmp_path)
    with pytest.raises(
        STFError, match=r"base-q: its weights are quantised \(mxfp4\); mergekit-stf"
    ):
        merge(recipe(packed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


U8, I32, HALF = torch.uint8, torch.int32, torch.float16
SIGNS: dict[str, tuple[str, dict[str, torch.dtype]]] = {
    "gptq": ("GPTQ", {".qweight": I32, ".qzeros": I32, ".scales": HALF, ".g_idx": I32}),
    "awq": ("GPTQ or AWQ", {".qweight": I32, ".qzeros": I32, ".scales": HALF}),
    "packed": ("compressed-tensors", {".weight_packed": I32, ".weight_scale": HALF}),
    "nf4": (
        "bitsandbytes nf4",
        {".weight": U8, ".weight.absmax": HALF, ".weight.quant_state.bitsandbytes__nf4": U8},
    ),
    "llm.int8": ("bitsandbytes", {".weight": torch.int8, ".SCB": HALF}),
    "hqq": ("HQQ", {".W_q": U8, ".scale": HALF, ".zero": HALF}),
    "nvfp4": ("NVFP4", {".weight": U8, ".weight_scale": HALF, ".weight_scale_2": HALF}),
    "int8": ("8-bit integers", {".weight": torch.int8, ".weight_scale": HALF}),
    "bare fp8": ("fp8", {".weight": torch.float8_e4m3fn}),
}
OLMO = ("Olmo3ForCausalLM", "Olmo3Config")


def spoil(folder: Path, parts: dict[str, torch.dtype]) -> None:
    """Put tensors of these names and types in the place of every projection."""
    file = folder / "model.safetensors"
    state: STATE = {}
    for name, tensor in load_file(file).items():
        if "proj" in name:
            stem = name.removesuffix(".weight")
            state |= {stem + end: torch.ones(8, 8).to(dtype) for end, dtype in parts.items()}
        else:
            state[name] = tensor
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("known", [True, False])
def test_other_formats_are_refused_by_name_before_any_work(
    sign: str, known: bool, tmp_path: Path
) -> None:
    """Also where the host infers the names of the class, and took these weights for optional."""
    inferred = transformers.Olmo3Config(**TEXT)
    model = llama() if known else build("Olmo3ForCausalLM", inferred)
    checkpoints = save_model(model, tmp_path, tasks=1)
    kind, parts = SIGNS[sign]
    spoil(checkpoints.tuned[0], parts)
    message = f"tuned1: its weights are quantised ({kind})"
    file = write_recipe(tmp_path / "r.yml", checkpoints)
    for command in (["plan", file], ["merge", file, tmp_path / "out"]):
        done = run(*command)
        assert done.exit_code == 1
        assert message in done.output.replace("\n", "")
        assert "dequantise" in done.output
    with pytest.raises(STFError) as error:
        merge(recipe(checkpoints), tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "kind"), [("torchao", "torchao"), ("hqq", "HQQ")])
def test_what_only_the_configuration_says_is_believed(
    method: str, kind: str, tmp_path: Path
) -> None:
    checkpoints = save_model(llama(), tmp_path, tasks=1)
    spoil(checkpoints.base, {".data": torch.int8})
    settings(checkpoints.base, quantization_config={"quant_method": method})
    done = run("sweep", write_recipe(tmp_path / "r.yml", checkpoints), tmp_path / "o", "--rank", 1)
    assert done.exit_code == 1
    assert f"base: its weights are quantised ({kind})" in done.output


def test_configuration_that_no_tensor_bears_out_is_named(tmp_path: Path) -> None:
    checkpoints = save_model(llama(), tmp_path, tasks=1)
    spoil(checkpoints.base, {".weight": torch.float32, ".data": torch.int8})
    settings(checkpoints.base, quantization_config=FP8)
    done = run("plan", write_recipe(tmp_path / "r.yml", checkpoints))
    assert done.exit_code == 1
    assert "quantised (fp8), but no tensor shows it" in done.output


def test_adapter_on_a_quantised_base_is_refused_where_the_host_would_merge_it(
    tmp_path: Path,
) -> None:
    packed, plain = both("llama in blocks of fp8", tmp_path)
    adapter = save_adapter(plain.base, tmp_path / "a", 1, target_modules=["q_proj"])
    models = Checkpoints(packed.base, (packed.tuned[0], Path(f"{packed.base}+{adapter}")))
    done = run("merge", write_recipe(tmp_path / "r.yml", models), tmp_path / "out")
    assert done.exit_code == 1
    assert f"+{adapter}: its weights are quantised (fp8)" in done.output


@pytest.mark.parametrize("whole", [True, False])
def test_gguf_is_named_with_the_lines_that_convert_it(whole: bool, tmp_path: Path) -> None:
    checkpoints = save_model(llama(), tmp_path, tasks=1)
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(checkpoints.base / "config.json", folder)
    (folder / "tiny-q4.gguf").write_bytes(b"GGUF")
    place = folder / "tiny-q4.gguf" if whole else folder
    models = Checkpoints(checkpoints.base, (place,))
    done = run("merge", write_recipe(tmp_path / "r.yml", models), tmp_path / "out")
    assert done.exit_code == 1
    assert "quantised (GGUF)" in done.output
    assert f"from_pretrained({str(folder)!r}, gguf_file='tiny-q4.gguf', " in done.output
    with pytest.raises(STFError, match=r"quantised \(GGUF\)"):
        merge(recipe(models), tmp_path / "out")


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scales of shape \(3, 1\) fit no weight of shape \(8, 8\)"
    ):
        apply_scales(torch.ones(8, 8), torch.ones(3, 1), (128, 128))


def test_exponents_of_eight_bits_scale_by_powers_of_two() -> None:
    scales = torch.tensor([[126, 128], [127, 130]], dtype=torch.uint8)
    found = apply_scales(torch.ones(2, 4), scales, (1, 2))
    assert found.tolist() == [[0.5, 0.5, 2, 2], [1, 1, 8, 8]]
    assert apply_scales(torch.ones(2, 4), scales.view(torch.float8_e8m0fnu), (1, 2)).equal(found)
