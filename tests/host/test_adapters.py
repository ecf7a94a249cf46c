"""Merges of adapters from their factors, against PEFT, the host's full route and float64."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures import coverage
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.diagnostics.notices import find_near_duplicates
from mergekit_stf.host.lora import model as adapter_model
from mergekit_stf.host.lora.adapter_file import total_error
from mergekit_stf.host.lora.ahead import Ahead
from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.lora import AdapterMerge, merge_to_adapter, merge_to_model
from tests import oracle
from tests.host import peft_adapters as made
from tests.host.models import gpt2, llama, save_family, save_model, vit

OPTIONS = MergeOptions(quiet=True, write_model_card=False)
IDS = torch.arange(10).unsqueeze(0)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(llama(), tmp_path_factory.mktemp("llama"), tasks=0).base


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(gpt2(), tmp_path_factory.mktemp("gpt2"), tasks=0).base


@pytest.fixture(scope="module")
def llama_adapters(llama_base: Path) -> list[Path]:
    root = llama_base.parent
    return [
        made.save_adapter(llama_base, root / "a1", 1, target_modules=made.LLAMA_LINEAR),
        made.save_adapter(
            llama_base, root / "a2", 2, r=4, lora_alpha=6, use_rslora=True,
            target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3},
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
        ),
        made.save_adapter(llama_base, root / "a3", 3, r=2, target_modules=["o_proj", "q_proj"]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2_adapters(gpt2_base: Path) -> list[Path]:
    root = gpt2_base.parent
    return [
        made.save_adapter(
            gpt2_base, root / f"a{seed}", seed, target_modules=made.GPT2_LINEAR, fan_in_fan_out=True
        )
        for seed in (1, 2)
    ]


def merged(content: dict[str, Any], out: Path, **options: Any) -> AdapterMerge:
    recipe = check_recipe(made.yaml.safe_dump(content, sort_keys=False))
    if options.pop("adapter", False):
        return merge_to_adapter(recipe, out, OPTIONS, **options)
    return merge_to_model(recipe, out, OPTIONS)


def full_route(base: Path, adapters: list[Path], out: Path, **rest: Any) -> dict[str, Tensor]:
    """Merge full copies, made by PEFT in float32, through the host."""
    copies = [
        made.save_full(base, adapter, out.parent / f"full{number}")
        for number, adapter in enumerate(adapters)
    ]
    entries = rest.pop("models", [{} for _ in copies])
    models = [{"model": str(c)} | entry for c, entry in zip(copies, entries, strict=True)]
    content = made.recipe(base, []) | {"models": models} | rest
    run_merge(MergeConfiguration.model_validate(content), str(out), OPTIONS)
    return made.tensors(out)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = torch.linalg.vector_norm(found[name].double() - tensor.double())
        assert error <= tolerance * torch.linalg.vector_norm(tensor.double()), name


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def test_llama_equals_the_full_route(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    rest = {"parameters": {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}]}}
    entries = [
        {"parameters": {"weight": 0.7}},
        {"parameters": {"weight": [{"filter": "q_proj", "value": 1.5}, {"value": 1.0}]}},
        {"parameters": {"weight": [0.2, 1.0]}},
    ]
    content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters)) | rest
    content["models"] = [a | b for a, b in zip(content["models"], entries, strict=True)]
    merged(content, tmp_path / "native")
    expected = full_route(llama_base, llama_adapters, tmp_path / "full", models=entries, **rest)
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)


def test_gpt2_equals_the_full_route(
    gpt2_base: Path, gpt2_adapters: list[Path], tmp_path: Path
) -> None:
    """Conv1D stores (in, out); the square ``attn.c_proj`` does not show it by its shape."""
    merged(made.recipe(gpt2_base, made.on_base(gpt2_base, gpt2_adapters)), tmp_path / "native")
    expected = full_route(gpt2_base, gpt2_adapters, tmp_path / "full")
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("t5", ["q", "wo"]),
        ("bert", ["query", "dense"]),
        ("clip", ["q_proj", "fc2"]),
        ("mamba", ["in_proj", "x_proj"]),
        ("mixtral", ["q_proj", "o_proj"]),
    ],
)
def test_other_families_equal_the_full_route(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    base = save_family(family, tmp_path, tasks=0).base
    adapters = [
        made.save_adapter(base, tmp_path / f"a{seed}", seed, target_modules=targets)
        for seed in (1, 2)
    ]
    content = made.recipe(base, made.on_base(base, adapters))
    merged(content, tmp_path / "native")
    merged(content, tmp_path / "adapter", adapter=True)
    full_route(base, adapters, tmp_path / "full")
    expected = made.load(tmp_path / "full").state_dict()
    assert_equal(made.load(tmp_path / "native").state_dict(), expected, 1e-5)
    adapted = made.with_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert_equal(adapted, expected, 1e-5)


def test_embeddings_biases_and_replaced_weights_equal_the_full_route(tmp_path: Path) -> None:
    base = save_model(llama(attention_bias=True), tmp_path, tasks=0).base
    adapters = [
        made.save_adapter(
            base, tmp_path / "a1", 1, target_modules=["embed_tokens", "q_proj"], bias="all",
            modules_to_save=["lm_head", "input_layernorm"],
        ),
        made.save_adapter(base, tmp_path / "a2", 2, target_modules=["embed_tokens", "k_proj"]),
        made.save_adapter(
            base, tmp_path / "a3", 3, target_modules=["lm_head"], modules_to_save=["o_proj"]
        ),
    ]  # fmt: skip
    stored = load_file(adapters[1] / "adapter_model.safetensors")
    stored["base_model.model.model.embed_tokens.base_layer.weight"].mul_(1.1)
    save_file(stored, adapters[1] / "adapter_model.safetensors")
    merged(made.recipe(base, made.on_base(base, adapters)), tmp_path / "native")
    expected = full_route(base, adapters, tmp_path / "full")
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)


def test_trimmed_updates_equal_the_oracle(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    densities, weights = [0.3, 1.0, 0.5], [1.0, 0.8, 1.2]
    content = made.recipe(llama_base, [], parameters={"lambda": 0.6})
    content["models"] = [
        {"model": model, "parameters": {"density": density, "weight": weight}}
        for model, density, weight in zip(
            made.on_base(llama_base, llama_adapters), densities, weights, strict=True
        )
    ]
    merged(content, tmp_path / "native")
    base, found = made.tensors(llama_base), made.tensors(tmp_path / "native")
    tuned = [
        made.with_adapter(llama_base, adapter, torch.float64).merge_and_unload().state_dict()
        for adapter in llama_adapters
    ]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        expected = oracle.merge_weight(
            base[name].double().numpy(), [t[name].numpy() for t in tuned], "superpose",
            weights, densities, 0.6,
        )  # fmt: skip
        assert_equal({name: found[name]}, {name: torch.from_numpy(expected)}, 1e-5)


def test_rule_rank_and_ridge_of_the_recipe_are_used(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    rules = [
        {"filter": "q_proj", "value": "sum"},
        {"filter": "o_proj", "value": "mean"},
        {"filter": "up_proj", "value": "base"},
        {"value": "auto"},
    ]
    rest = {"parameters": {"rule": rules, "rank": 2, "ridge": 0.1}}
    merged(
        made.recipe(llama_base, made.on_base(llama_base, llama_adapters), **rest),
        tmp_path / "native",
    )
    expected = full_route(llama_base, llama_adapters, tmp_path / "full", **rest)
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_and_adapter_give_equal_logits(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(f"{family}_base")
    adapters: list[Path] = request.getfixturevalue(f"{family}_adapters")
    content = made.recipe(base, made.on_base(base, adapters))
    merged(content, tmp_path / "model")
    written = merged(content, tmp_path / "adapter", adapter=True)
    of_model = logits(made.load(tmp_path / "model"))
    of_adapter = logits(made.with_adapter(base, tmp_path / "adapter"))
    assert torch.allclose(of_model, of_adapter, atol=1e-4)
    assert not torch.allclose(of_model, logits(made.load(base)), atol=1e-2)
    assert written.adapters == len(adapters)


def test_rank_of_the_adapter_is_the_sum_of_the_ranks(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters))
    written = merged(content, tmp_path / "adapter", adapter=True)
    ranks = {module.name.removeprefix("model."): module.rank for module in written.modules}
    assert ranks["layers.0.self_attn.q_proj"] == 3 + 4 + 2
    assert ranks["layers.1.self_attn.q_proj"] == 3 + 2 + 2
    assert ranks["layers.1.mlp.up_proj"] == 3
    assert all(module.dropped == 0 for module in written.modules)


def test_truncated_adapter_states_its_error(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters))
    merged(content, tmp_path / "model")
    written = merged(content, tmp_path / "adapter", adapter=True, max_rank=4)
    base, whole = made.tensors(llama_base), made.tensors(tmp_path / "model")
    short = made.with_adapter(llama_base, tmp_path / "adapter").merge_and_unload().state_dict()
    for module in written.modules:
        name = f"{module.name}.weight"
        left = torch.linalg.norm(whole[name] - short[name])
        update = torch.linalg.norm(whole[name] - base[name])
        assert module.rank <= 4
        assert module.error == pytest.approx(float(left / update), abs=1e-5)
    assert total_error(written.modules) > 0.01


def test_embedding_update_fits_into_an_adapter(llama_base: Path, tmp_path: Path) -> None:
    adapters = [
        made.save_adapter(llama_base, tmp_path / f"e{seed}", seed, target_modules=["embed_tokens"])
        for seed in (1, 2)
    ]
    content = made.recipe(llama_base, made.on_base(llama_base, adapters))
    merged(content, tmp_path / "model")
    merged(content, tmp_path / "adapter", adapter=True)
    of_adapter = logits(made.with_adapter(llama_base, tmp_path / "adapter"))
    assert torch.allclose(logits(made.load(tmp_path / "model")), of_adapter, atol=1e-4)


def test_half_precision_base_is_rounded_once(llama_base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    made.load(llama_base).bfloat16().save_pretrained(half)
    adapter = made.save_adapter(half, tmp_path / "a", 1, target_modules=["q_proj"])
    content = made.recipe(half, [f"{half}+{adapter}"], parameters={"lambda": 1.0})
    merged(content, tmp_path / "native")
    found, base = made.tensors(tmp_path / "native"), made.tensors(half)
    exact = made.with_adapter(half, adapter).merge_and_unload().state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if "q_proj" in name:
            assert torch.equal(tensor, exact[name].bfloat16())
        else:
            assert torch.equal(tensor, base[name])


def test_types_and_shards_of_the_output(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters), dtype="float16")
    recipe = check_recipe(made.yaml.safe_dump(content))
    options = OPTIONS.model_copy(update={"out_shard_size": 8000})
    merge_to_model(recipe, tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert {t.dtype for t in made.tensors(tmp_path / "out").values()} == {torch.float16}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["dtype"] == "float16"
    made.load(tmp_path / "out")
    merge_to_adapter(recipe, tmp_path / "adapter", options)
    assert {t.dtype for t in made.tensors(tmp_path / "adapter").values()} == {torch.float16}


def test_tensors_that_no_table_names_are_copied(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path
) -> None:
    """Old Llama checkpoints store rotary frequencies."""
    base = shutil.copytree(llama_base, tmp_path / "base")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "ids": torch.arange(3)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors")
    content = made.recipe(base, [f"{base}+{llama_adapters[0]}"], out_dtype="bfloat16")
    merged(content, tmp_path / "out")
    found = made.tensors(tmp_path / "out")
    (frequencies, numbers) = (found[name] for name in extra)
    assert torch.equal(frequencies, next(iter(extra.values())).bfloat16())
    assert torch.equal(numbers, torch.arange(3))


def test_checkpoint_with_names_of_its_own(
    gpt2_base: Path, gpt2_adapters: list[Path], tmp_path: Path
) -> None:
    """The published GPT-2 stores ``h.0.attn.c_attn.weight``, PEFT says ``transformer.h.0...``."""
    base = shutil.copytree(gpt2_base, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    for folder, here in ((tmp_path / "native", base), (tmp_path / "plain", gpt2_base)):
        merged(made.recipe(here, made.on_base(here, gpt2_adapters)), folder)
    found, expected = made.tensors(tmp_path / "native"), made.tensors(tmp_path / "plain")
    assert set(found) == set(renamed)
    assert_equal({f"transformer.{name}": found[name] for name in found}, expected, 0)


def test_adapter_keeps_the_names_of_the_modules(tmp_path: Path) -> None:
    """Transformers renames the weights of ViT checkpoints when it loads them."""
    base = save_model(vit(), tmp_path, tasks=0).base
    adapters = [
        made.save_adapter(base, tmp_path / f"a{seed}", seed, target_modules=["q_proj", "fc1"])
        for seed in (1, 2)
    ]
    content = made.recipe(base, made.on_base(base, adapters))
    merged(content, tmp_path / "model")
    merged(content, tmp_path / "adapter", adapter=True)
    expected = made.load(tmp_path / "model").state_dict()
    adapted = made.with_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert_equal(adapted, expected, 1e-6)


def test_small_updates_keep_their_value(llama_base: Path, tmp_path: Path) -> None:
    """A full copy in float32 would round an update of this size to 1e-3 of itself."""
    adapters = [
        made.save_adapter(
            llama_base, tmp_path / f"s{seed}", seed, target_modules=["q_proj"], lora_alpha=1e-4
        )
        for seed in (1, 2, 3)
    ]
    content = made.recipe(
        llama_base, made.on_base(llama_base, adapters), parameters={"lambda": 1.0}
    )
    merged(content, tmp_path / "out", adapter=True)
    name, weight = "model.layers.0.self_attn.q_proj", load_file(llama_base / "model.safetensors")
    deltas = [product(adapter, name) * 1e-4 / 3 for adapter in adapters]
    expected = torch.from_numpy(oracle.superpose([delta.numpy() for delta in deltas]))
    assert torch.linalg.norm(expected) < 1e-3 * torch.linalg.norm(weight[f"{name}.weight"])
    assert_equal({name: product(tmp_path / "out", name)}, {name: expected}, 1e-5)


def product(adapter: Path, module: str) -> Tensor:
    """Return ``B A`` of a module in float64."""
    stored = load_file(adapter / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.{module}.lora_{kind}.weight"].double() for kind in "AB")
    return B @ A


def test_contradicting_adapters_are_damped_and_named(
    llama_base: Path,
    llama_adapters: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An adapter and a copy with a little noise: the exact answer would be a hundred times both."""
    first, noisy = llama_adapters[0], tmp_path / "noisy"
    shutil.copytree(first, noisy)
    stored = load_file(noisy / "adapter_model.safetensors")
    torch.manual_seed(5)
    for tensor in stored.values():
        tensor.mul_(1.05).add_(1e-3 * torch.randn_like(tensor))
    save_file(stored, noisy / "adapter_model.safetensors")
    content = made.recipe(llama_base, made.on_base(llama_base, [first, noisy]))
    merged(content, tmp_path / "native")
    expected = full_route(llama_base, [first, noisy], tmp_path / "full")
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)
    records = diagnostics.read_records(tmp_path / "native" / diagnostics.FILE_NAME)
    damped = [set(find_near_duplicates(record)) for record in records if record.cutoff]
    assert damped
    assert all(pairs == {(str(first), str(noisy))} for pairs in damped)
    assert f"{len(damped)} weights were ill-posed and damped: {first} and {noisy}" in caplog.text


@pytest.mark.parametrize(("rank", "densities"), [(1.0, [1.0, 1.0]), (1, [0.5, 1.0])])
def test_split_projection_equals_the_full_route(
    rank: float, densities: list[float], gpt2_base: Path, gpt2_adapters: list[Path], tmp_path: Path
) -> None:
    split = [{"filter": "c_attn", "value": "columns 3"}, {"filter": "c_fc", "value": "rows 10,6"}]
    rest = {"parameters": {"split": [*split, {"value": "none"}], "rank": rank}}
    entries = [{"parameters": {"density": density}} for density in densities]
    content = made.recipe(gpt2_base, made.on_base(gpt2_base, gpt2_adapters), **rest)
    content["models"] = [a | b for a, b in zip(content["models"], entries, strict=True)]
    merged(content, tmp_path / "native")
    expected = full_route(gpt2_base, gpt2_adapters, tmp_path / "full", models=entries, **rest)
    assert_equal(made.tensors(tmp_path / "native"), expected, 1e-5)
    merged(content | {"parameters": {"rank": rank}}, tmp_path / "whole")
    with pytest.raises(AssertionError, match="c_attn"):
        assert_equal(made.tensors(tmp_path / "whole"), expected, 1e-5)


def test_native_merge_does_not_need_the_whole_table(
    llama_base: Path, llama_adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host would lose a weight of the base it is refused; this route writes them all."""
    monkeypatch.setattr(coverage, "lost_weights", lambda inputs: {inputs[0].model: ["a.weight"]})
    content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters))
    merged(content, tmp_path / "out")
    assert set(made.tensors(tmp_path / "out")) == set(made.tensors(llama_base))
    full = made.save_full(llama_base, llama_adapters[0], tmp_path / "full")
    with pytest.raises(STFError, match="would be missing"):
        run_merge(
            MergeConfiguration.model_validate(made.recipe(llama_base, [str(full)])),
            str(tmp_path / "host"),
            OPTIONS,
        )


def test_dora_goes_the_plain_way(llama_base: Path, tmp_path: Path) -> None:
    """PEFT merges it into a copy of the base, and the host merges the copies."""
    adapters = [
        made.save_adapter(
            llama_base, tmp_path / f"d{n}", n, target_modules=["q_proj"], use_dora=True
        )
        for n in (1, 2)
    ]
    content = made.recipe(llama_base, made.on_base(llama_base, adapters))
    with pytest.raises(STFError, match=r"DoRA.*mergekit-stf merge"):
        merged(content, tmp_path / "native")
    update = {"lora_merge_cache": str(tmp_path / "cache"), "lora_merge_dtype": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers, called by the host
        run_merge(
            MergeConfiguration.model_validate(content),
            str(tmp_path / "out"),
            OPTIONS.model_copy(update=update),
        )
    expected = full_route(llama_base, adapters, tmp_path / "full")
    assert_equal(made.tensors(tmp_path / "out"), expected, 1e-5)


def test_weights_are_merged_a_few_ahead_and_in_any_order() -> None:
    merged_names: list[str] = []
    names = [str(number) for number in range(20)]

    def doubled(name: str) -> int:
        merged_names.append(name)
        return 2 * int(name)

    with Ahead(names, doubled) as results:
        for name in ("0", "9", "3"):
            assert results.take(name) == 2 * int(name)
    assert merged_names == names[: len(merged_names)]
    assert 10 <= len(merged_names) <= 16


@pytest.mark.parametrize(("parameters", "expected"), [({}, 1), ({"density": 0.5}, 2)])
def test_small_products_take_one_core(
    parameters: dict[str, float],
    expected: int,
    llama_base: Path,
    llama_adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[int] = set()

    write = adapter_model.write_shards

    def write_shards(*arguments: Any) -> None:
        seen.add(torch.get_num_threads())
        write(*arguments)

    monkeypatch.setattr(adapter_model, "write_shards", write_shards)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        content = made.recipe(llama_base, made.on_base(llama_base, llama_adapters))
        merged(content | {"parameters": parameters}, tmp_path / "out")
        assert (seen, torch.get_num_threads()) == ({expected}, 2)
    finally:
        torch.set_num_threads(before)
