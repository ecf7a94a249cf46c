"""No entry becomes infinite on the way to the file, on any route, and the error says which."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelPath, ModelReference
from safetensors.torch import load_file, save_file

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.diagnostics.notices import Notices
from mergekit_stf.host.merging.finite import copy_weight, is_finite, round_weight
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.lora import merge_to_adapter, merge_to_model
from tests.host import peft_adapters as made
from tests.host.merging import merge, recipe
from tests.host.models import Checkpoints, save_family

OUTLIERS = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "bert": "embeddings.word_embeddings.weight",
    "mixtral": "model.layers.0.input_layernorm.weight",
}


def scale(models: Checkpoints, factor: float, dtype: torch.dtype = torch.float32) -> None:
    for folder in (models.base, *models.tuned):
        file = folder / "model.safetensors"
        tensors = {name: t.to(dtype) * factor for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def put(folder: Path, name: str, value: float, shape: tuple[int, ...] | None = None) -> None:
    """Set the first entry of a tensor, or add a tensor that is this value everywhere."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if shape is not None:
        tensors[name] = torch.full(shape, value)
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "source", "target", "message"),
    [
        (1e5, "float32", "float16", "is 100000, and float16 ends at 65504; write `out_dtype: bfl"),
        (-7e4, "float64", "float16", "is 70000, and float16 ends at 65504; write `out_dtype: bfl"),
        (500.0, "float32", "float8_e4m3fn", "is 500, and float8_e4m3fn ends at 448; write `out_dt"),
        (7e4, "float32", "float8_e5m2", "ends at 57344; write `out_dtype: bfloat16`"),
        (1e200, "float64", "float32", r"is 1e\+200, and float32 ends at .* `out_dtype: float64`"),
        (1e200, "float64", "bfloat16", "write `out_dtype: float64`"),
        (float("inf"), "float32", "float32", "overflows float32 .*`weight` or `lambda`, are too"),
        (float("nan"), "float32", "bfloat16", "overflows float32"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(
    value: float, source: str, target: str, message: str
) -> None:
    x = torch.tensor([[1.0, 2.0], [value, 0.5]], dtype=getattr(torch, source))
    with pytest.raises(STFError, match=f"^w: .*{message}") as error:
        round_weight("w", x, getattr(torch, target))
    assert "\n" not in str(error.value)


def test_what_rounds_to_the_greatest_value_is_kept() -> None:
    x = torch.tensor([65519.0, -65519.0, 1e-9])
    assert round_weight("w", x, torch.float16).tolist() == [65504, -65504, 0]
    assert round_weight("w", torch.tensor([460.0]), torch.float8_e4m3fn).float().item() == 448
    assert round_weight("w", torch.zeros(0, 3), torch.float16).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "complex64"])
def test_types_that_torch_does_not_compare_are_looked_at(dtype: str) -> None:
    x = torch.ones(3).to(getattr(torch, dtype))
    assert is_finite(x)
    x[1] = float("nan")
    assert not is_finite(x)
    assert is_finite(torch.tensor([True, False]))
    assert is_finite(torch.arange(3))


@pytest.mark.parametrize("family", OUTLIERS)
def test_a_merge_beyond_float16_stops_mergekit_yaml(family: str, tmp_path: Path) -> None:
    models = save_family(family, tmp_path, tasks=2)
    for folder, value in ((models.base, 100.0), (models.tuned[0], 9e4), (models.tuned[1], 9.5e4)):
        put(folder, OUTLIERS[family], value)
    with pytest.raises(STFError, match=rf"^{OUTLIERS[family]}: its largest entry .* ends at 65504"):
        merge(recipe(models, out_dtype="float16"), tmp_path / "out")
    merge(recipe(models, out_dtype="bfloat16"), tmp_path / "wide")
    out = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(is_finite(tensor) for tensor in out.values())
    expected = {"norm": 9.25e4}.get(OUTLIERS[family][-11:-7], 100 + 0.8 * (9e4 + 9.5e4 - 200))
    assert float(out[OUTLIERS[family]].view(-1)[0]) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize(("family", "name"), list(OUTLIERS.items()))
def test_a_copied_weight_is_not_rounded_to_infinity(family: str, name: str, tmp_path: Path) -> None:
    models = save_family(family, tmp_path, tasks=1)
    put(models.base, name, 1e5)
    tensors = load_file(models.base / "model.safetensors")
    own = load_file(models.tuned[0] / "model.safetensors") | {name: tensors[name]}
    save_file(own, models.tuned[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(STFError, match=rf"^{name}: its largest entry is 100000, and float16 ends"):
        merge(recipe(models, out_dtype="float16"), tmp_path / "unchanged")
    put(models.tuned[0], name, 1.0)
    kept: dict[str, Any] = {"parameters": {"rule": "base"}}
    with pytest.raises(STFError, match=rf"^{name}: its largest entry is 100000, and float16 ends"):
        merge(recipe(models, out_dtype="float16") | kept, tmp_path / "base")


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_float64_checkpoints_do_not_overflow_in_silence(family: str, tmp_path: Path) -> None:
    models = save_family(family, tmp_path, tasks=2)
    scale(models, 1e100, torch.float64)
    with pytest.raises(STFError, match=r"float32 ends at .*`out_dtype: float64`"):
        merge(recipe(models, out_dtype="float32"), tmp_path / "narrow")
    merge(recipe(models), tmp_path / "out")
    small = load_file(tmp_path / "out" / "model.safetensors")
    assert all(map(is_finite, small.values()))
    scale(models, 1e100, torch.float64)  # squares of its entries overflow
    merge(recipe(models), tmp_path / "squares")
    for name, large in load_file(tmp_path / "squares" / "model.safetensors").items():
        torch.testing.assert_close(large / 1e200, small[name] / 1e100, msg=name)
    scale(models, 1e107, torch.float64)
    rules = {"parameters": {"rule": "sum", "lambda": 1e4}}
    with pytest.raises(STFError, match="merging it overflows float64"):
        merge(recipe(models) | rules, tmp_path / "sum")


def test_an_infinite_mask_of_the_base_is_copied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Old GPT-2 and GPT-NeoX checkpoints store masks; transformers has no use for them."""
    base = save_family("gpt2", tmp_path, tasks=1).base
    model = ModelReference(model=ModelPath(path=str(base)))
    mask = torch.tensor([0.0, float("-inf")])
    found = [
        copy_weight(f"transformer.h.{i}.attn.own_mask", mask, torch.float16, model) for i in (0, 1)
    ]
    kept = found[0][0]
    with caplog.at_level(logging.WARNING):
        Notices().say(notice for _, notices in found for notice in notices)
    assert kept.dtype == torch.float16
    assert kept.tolist() == mask.tolist()
    assert [r.message for r in caplog.records] == [
        "transformer.h.*.attn.own_mask holds infinite entries in the base and is no parameter; "
        "it is copied"
    ]
    for name, values in (
        ("transformer.wpe.weight", [0.0, float("-inf")]),
        ("transformer.h.0.attn.own_mask", [0.0, float("nan")]),
    ):
        with pytest.raises(STFError, match="base_model has 1 entries that are NaN or infinite"):
            copy_weight(name, torch.tensor(values), torch.float32, model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_do_not_overflow_in_silence(family: str, tmp_path: Path) -> None:
    base = save_family(family, tmp_path, tasks=0).base
    linear = made.LLAMA_LINEAR[:2] if family == "llama" else made.GPT2_LINEAR[:1]
    more: dict[str, Any] = {"target_modules": linear, "fan_in_fan_out": family == "gpt2"}
    small = made.save_adapter(base, tmp_path / "small", 1, **more)
    huge = made.save_adapter(base, tmp_path / "huge", 2, lora_alpha=1e300, **more)
    large = made.save_adapter(base, tmp_path / "large", 2, lora_alpha=1e7, **more)

    def run(adapter: Path, route: Any = merge_to_model, **rest: Any) -> None:
        content = made.recipe(base, made.on_base(base, [small, adapter])) | rest
        route(
            check_recipe(made.yaml.safe_dump(content)), tmp_path / "out", MergeOptions(quiet=True)
        )

    for route in (merge_to_model, merge_to_adapter):
        with pytest.raises(
            STFError, match=r"(q_proj|k_proj|c_attn): its update, .* more than float32 holds"
        ):
            run(huge, route)
        with pytest.raises(STFError, match="float16 ends at 65504"):
            run(large, route, out_dtype="float16")
        assert not (tmp_path / "out").exists()
    run(large)
    assert all(is_finite(t) for t in load_file(tmp_path / "out" / "model.safetensors").values())
