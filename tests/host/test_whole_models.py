"""Lengths of whole models, read before the first weight: metagpt in every way to merge."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.common import ModelReference
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from safetensors.torch import load_file, save_file

from mergekit_stf.cli.main import main
from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.compat import close_checkpoints
from mergekit_stf.host.lora.jobs import measure_distances as measure_adapters
from mergekit_stf.host.lora.plan import plan_adapters
from mergekit_stf.host.merging.whole_models import measure_distances
from mergekit_stf.host.planning.planned import PlannedWeight
from mergekit_stf.host.recipe.recipe import check_recipe
from tests.elementwise_oracles import metagpt
from tests.host import peft_adapters as made
from tests.host.merging import State, merge, parameters, recipe, relative_error
from tests.host.models import (
    FAMILIES,
    Checkpoints,
    llama,
    perturb,
    save_family,
    save_model,
    tensors_of,
)


def config_of(models: Checkpoints, **more: Any) -> dict[str, Any]:
    return recipe(models, merge_method="metagpt", parameters={}, **more)


def command(name: str, config: dict[str, Any], out: Path, *options: str) -> str:
    path = made.write(config, out.parent / f"{out.name}.yml")
    result = CliRunner().invoke(main, [name, str(path), str(out), *options])
    assert result.exit_code == 0, result.output
    return result.output


def check(found: State, base: State, tuned: list[State], tolerance: float = 1e-4) -> None:
    base, *tuned = ({n: P.double() for n, P in one.items()} for one in (base, *tuned))
    squares = [sum(float((one[n] - base[n]).square().sum()) for n in base) for one in tuned]
    for name, P0 in base.items():
        M = metagpt([(one[name] - P0).numpy() for one in tuned], squares)
        error = relative_error(found[name], P0 + torch.from_numpy(np.asarray(M)), P0)
        assert error <= tolerance, (name, error)


@pytest.fixture
def models(tmp_path: Path, layout: str) -> Checkpoints:
    """A base and two tuned models, one of which moved four times as far."""
    made = save_family("llama", tmp_path, tasks=1, layout=layout)
    folder = tmp_path / "far"
    perturb(llama(), 9, 0.08).save_pretrained(folder)
    return Checkpoints(made.base, (*made.tuned, folder))


def states(models: Checkpoints, family: str = "llama") -> tuple[State, list[State]]:
    kind = type(FAMILIES[family]())
    base, *tuned = (parameters(folder, kind) for folder in (models.base, *models.tuned))
    return base, tuned


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_every_way_gives_the_same_bytes(models: Checkpoints, tmp_path: Path) -> None:
    config = config_of(models)
    merge(config, tmp_path / "yaml")
    check(parameters(tmp_path / "yaml", type(llama())), *states(models))
    command("merge", config, tmp_path / "merged", "--store", str(tmp_path / "store"))
    again = command("merge", config, tmp_path / "again", "--store", str(tmp_path / "store"))
    assert "16 matrices found" in again
    assert shards(tmp_path / "merged") == shards(tmp_path / "again")
    rebuilt = CliRunner().invoke(main, ["verify", str(tmp_path / "merged"), "--rebuild"])
    assert "merged again to the same bytes" in rebuilt.output
    kind = type(llama())
    yaml_way, own_way = (parameters(tmp_path / name, kind) for name in ("yaml", "merged"))
    assert all(torch.equal(yaml_way[name], own_way[name]) for name in yaml_way)


def test_all_models_are_read_once(
    models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], PlannedWeight.load
    monkeypatch.setattr(
        PlannedWeight, "load", lambda self, model: read.append(self.name) or load(self, model)
    )
    merge(config_of(models), tmp_path / "out")
    weights = tensors_of(tmp_path / "out")
    assert sorted(read) == sorted(3 * list(weights))


def test_another_weight_of_a_model_changes_what_the_store_finds(
    models: Checkpoints, tmp_path: Path
) -> None:
    """The answer of each weight depends on all others, and so does its key."""
    config, store = config_of(models), ("--store", str(tmp_path / "store"))
    command("merge", config, tmp_path / "one", *store)
    file = models.tuned[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    close_checkpoints()
    assert "0 matrices found" in command("merge", config, tmp_path / "two", *store)
    check(parameters(tmp_path / "two", type(llama())), *states(models))


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_checkpoints_in_half_precision(family: str, tmp_path: Path) -> None:
    models = save_family(family, tmp_path, tasks=2, dtype=torch.bfloat16, layout="sharded")
    merge(config_of(models, dtype="float32"), tmp_path / "out")
    check(parameters(tmp_path / "out", type(FAMILIES[family]())), *states(models, family))


def test_slices_take_the_lengths_of_whole_models(models: Checkpoints, tmp_path: Path) -> None:
    config = config_of(models)
    sources = [{"model": str(folder)} for folder in (models.base, *models.tuned)]
    config["slices"] = [
        {"sources": [source | {"layer_range": [layer, layer + 1]} for source in sources]}
        for layer in (0, 1)
    ]
    del config["models"]
    merge(config, tmp_path / "out")
    check(parameters(tmp_path / "out", type(llama())), *states(models))


def test_bare_files(tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"a.weight": (8, 6), "b.bias": (7,)}
        tensors = {n: (1 + seed) * torch.randn(s, generator=generator) for n, s in shapes.items()}
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, files[-1])
    base, *tuned = map(str, files)
    config = {
        "merge_method": "metagpt",
        "base_model": base,
        "models": [{"model": m} for m in tuned],
    }
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    arguments = [str(path), str(tmp_path / "out")]
    CliRunner().invoke(mergekit_pytorch, arguments, catch_exceptions=False)
    found, start, *others = map(load_file, (tmp_path / "out" / "model.safetensors", *files))
    check(found, start, others, 1e-5)


def test_bare_tensors_are_refused() -> None:
    given = [{"layer.weight": torch.randn(4, 4)} for _ in range(3)]
    with pytest.raises(STFError, match="metagpt needs whole models, and got tensors"):
        merge_state_dicts(given, "metagpt", base=0)


def test_another_vocabulary_is_left_out_aloud(
    models: Checkpoints, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    longer = llama(vocab_size=48)
    longer.save_pretrained(tmp_path / "longer")
    grown = Checkpoints(models.base, (models.tuned[1], tmp_path / "longer"))

    refs = [ModelReference.model_validate(str(folder)) for folder in (grown.base, *grown.tuned)]
    with caplog.at_level(logging.WARNING):
        found = measure_distances(methods.get("metagpt"), refs[0], refs[1:])
    base = tensors_of(models.base)
    other = load_file(tmp_path / "longer" / "model.safetensors")
    same = [name for name in base if base[name].shape == other[name].shape]
    expected = sum(float((other[n].double() - base[n].double()).square().sum()) for n in same)
    assert found[1] == pytest.approx(expected, rel=1e-6)
    assert sum("left out of the model's length" in line for line in caplog.messages) == 2


def test_a_value_that_is_no_number_is_named(models: Checkpoints, tmp_path: Path) -> None:
    file = models.tuned[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(STFError, match=r"model\.norm\.weight: .*far has 1 entries that are NaN"):
        merge(config_of(models), tmp_path / "out")


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_adapters_from_their_factors(form: str, tmp_path: Path) -> None:
    base = save_model(llama(), tmp_path, tasks=0).base
    more = [{"modules_to_save": ["input_layernorm"]} if form == "model" else {}, {"r": 5}]
    adapters = [
        made.save_adapter(
            base, tmp_path / f"adapter{seed}", seed, target_modules=made.LLAMA_LINEAR, **extra
        )
        for seed, extra in enumerate(more, start=1)
    ]
    config = made.recipe(base, made.on_base(base, adapters), merge_method="metagpt")
    out = tmp_path / "out"
    command("lora", config, out, *(["--adapter"] if form == "adapter" else []))
    full = out if form == "model" else made.save_full(base, out, tmp_path / "full")
    copies = [made.save_full(base, path, tmp_path / f"{path.name}-full") for path in adapters]
    kind = type(llama())
    start, *tuned = (parameters(folder, kind) for folder in (base, *copies))
    check(parameters(full, kind), start, tuned)


def test_the_lengths_of_adapters_are_those_of_their_products(tmp_path: Path) -> None:
    base = save_model(llama(), tmp_path, tasks=0).base
    adapter = made.save_adapter(
        base, tmp_path / "adapter", 1, target_modules=made.LLAMA_LINEAR, bias="none"
    )
    full = made.save_full(base, adapter, tmp_path / "full", torch.float64)
    start, tuned = tensors_of(base), tensors_of(full)
    exact = sum(float((tuned[n].double() - start[n].double()).square().sum()) for n in start)
    config = made.recipe(base, made.on_base(base, [adapter]), merge_method="metagpt")

    plan = plan_adapters(check_recipe(yaml.safe_dump(config)).config, MergeOptions())
    assert measure_adapters(plan) == (pytest.approx(exact, rel=1e-6),)
