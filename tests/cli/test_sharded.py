"""Checkpoints in several files: every command reads them as it reads one file, or refuses them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.provenance.lock import read_lock
from tests.cli.merges import run, write_recipe
from tests.host import peft_adapters as made
from tests.host.merging import LAMBDA, worst_error
from tests.host.models import LAYOUTS, Checkpoints, lay_out, save_family, tensors_of

FAMILIES = ("llama", "gpt2", "mixtral")
PAIRS = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def merged_by_the_host(recipe: Path, out: Path) -> None:
    arguments = [str(recipe), str(out), "--quiet", "--no-copy-tokenizer"]
    CliRunner().invoke(mergekit_yaml, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_values_do_not_depend_on_the_files(family: str, layout: str, tmp_path: Path) -> None:
    """Through plan, merge, sweep, verify with a rebuild, and the host's own command."""
    models = save_family(family, tmp_path, tasks=2, layout=layout)
    recipe = write_recipe(tmp_path / "r.yml", models, **{"lambda": LAMBDA})
    assert run("plan", recipe).exit_code == 0
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    error, name = worst_error(models, tmp_path / "out", 1.0)
    assert error < 1e-5, name
    swept = run("sweep", recipe, tmp_path / "sweep", "--lambda", LAMBDA, "--quiet")
    assert swept.exit_code == 0, swept.output
    merged_by_the_host(recipe, tmp_path / "host")
    wanted = tensors_of(tmp_path / "out")
    for folder in (tmp_path / "sweep" / f"lambda-{LAMBDA}", tmp_path / "host"):
        found = tensors_of(folder)
        assert found.keys() == wanted.keys()
        assert all(found[name].equal(wanted[name]) for name in wanted)
    for model in read_lock(tmp_path / "out").models:
        folder = Path(model.reference)
        assert {record.name for record in model.files} == {p.name for p in folder.iterdir()}
        assert model.commit is None
    verified = run("verify", tmp_path / "out", "--rebuild")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_on_a_base_of_several_files(layout: str, tmp_path: Path) -> None:
    plain = save_family("llama", tmp_path / "models", tasks=0).base
    adapters = [
        made.save_adapter(plain, tmp_path / f"a{seed}", seed, target_modules=made.LLAMA_LINEAR)
        for seed in (1, 2)
    ]
    base = lay_out(shutil.copytree(plain, tmp_path / "base"), layout)
    outputs = {}
    for name, folder in (("plain", plain), ("laid", base)):
        content = made.recipe(folder, made.on_base(folder, adapters))
        recipe = made.write(content, tmp_path / f"{name}.yml")
        for options in ([], ["--lock"], ["--adapter"]):
            out = tmp_path / f"{name}{''.join(options)}"
            done = run("lora", recipe, out, "--quiet", *options)
            assert done.exit_code == 0, done.output
            outputs[out.name] = tensors_of(out)
    for options in ("", "--lock", "--adapter"):
        found, wanted = outputs[f"laid{options}"], outputs[f"plain{options}"]
        assert found.keys() == wanted.keys()
        assert all(found[name].equal(wanted[name]) for name in wanted)
    verified = run("verify", tmp_path / "laid--lock", "--rebuild")
    assert verified.exit_code == 0, verified.output
    (record,) = (m for m in read_lock(tmp_path / "laid--lock").models if m.reference == str(base))
    assert {file.name for file in record.files} == {path.name for path in base.iterdir()}


@pytest.mark.slow
def test_shards_are_reported_and_merged_again(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path, tasks=2, layout="sharded")
    recipe = write_recipe(tmp_path / "r.yml", models)
    out = tmp_path / "out"
    assert run("merge", recipe, out, "--quiet", "--out-shard-size", "4000").exit_code == 0
    assert (out / INDEX).exists()
    assert run("report", out, "--sample", 2, "--quiet").exit_code == 0
    again = write_recipe(tmp_path / "again.yml", Checkpoints(models.base, (out,)), **{"lambda": 1})
    done = run("merge", again, tmp_path / "same", "--quiet")
    assert done.exit_code == 0, done.output
    found, wanted = tensors_of(tmp_path / "same"), tensors_of(out)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_family("llama", tmp_path_factory.mktemp("source"), tasks=1)


@pytest.fixture
def models(source: Checkpoints, tmp_path: Path) -> Checkpoints:
    """A base of one file and a tuned model of several, whose files a test may change."""
    base = shutil.copytree(source.base, tmp_path / "base")
    tuned = lay_out(shutil.copytree(source.tuned[0], tmp_path / "tuned"), "sharded")
    return Checkpoints(base, (tuned,))


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yml", models)


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).unlink()
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(folder: Path, number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[number]
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def shard_of(folder: Path, weight: str) -> int:
    shards = sorted(folder.glob("model-*.safetensors"))
    return next(number for number, path in enumerate(shards) if weight in load_file(path))


def weight_in_two_shards(folder: Path) -> None:
    other = (shard_of(folder, WEIGHT) + 1) % 3
    edit_shard(folder, other, lambda tensors: tensors.update({WEIGHT: torch.ones(24, 16)}))


def weight_in_no_shard(folder: Path) -> None:
    edit_shard(folder, shard_of(folder, WEIGHT), lambda tensors: tensors.pop(WEIGHT))


def weight_in_another_shard(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    other = names[(shard_of(folder, WEIGHT) + 1) % 3]
    edit_index(folder, lambda places: places.update({WEIGHT: other}))


def single_file_beside(folder: Path) -> None:
    save_file(tensors_of(folder), folder / "model.safetensors", {"format": "pt"})


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two shards": (weight_in_two_shards, f"{WEIGHT}: both in model-0"),
    "no shard": (weight_in_no_shard, f"{WEIGHT}: not in model-0"),
    "another shard": (weight_in_another_shard, f"{WEIGHT}: not in model-0"),
    "not in the index": (
        lambda folder: edit_index(folder, lambda places: places.pop(WEIGHT)),
        f"{WEIGHT}: in model-0",
    ),
    "shard absent": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors is missing; model.safetensors.index.json names it",
    ),
    "outside": (
        lambda folder: edit_index(folder, lambda p: p.update({WEIGHT: "../base/x.safetensors"})),
        "'../base/x.safetensors' is no file name inside",
    ),
    "absolute": (
        lambda folder: edit_index(folder, lambda p: p.update({WEIGHT: "/etc/passwd"})),
        "'/etc/passwd' is no file name inside",
    ),
    "no text": (
        lambda folder: edit_index(folder, lambda p: p.update({WEIGHT: 3})),  # type: ignore[dict-item]
        f"{INDEX} is damaged: it maps no weights to files",
    ),
    "empty": (
        lambda folder: edit_index(folder, lambda places: places.clear()),
        f"{INDEX} is damaged: it maps no weights to files",
    ),
    "nested": (
        lambda folder: (folder / INDEX).write_text('{"weight_map":' + "[" * 100_000),
        f"{INDEX} is damaged: it maps no weights to files",
    ),
    "single file beside": (
        single_file_beside,
        f"holds both model.safetensors and {INDEX}",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds no weights; expected"),
}


@pytest.mark.parametrize("command", ["plan", "merge", "sweep", "lora"])
@pytest.mark.parametrize("kind", list(WRONG))
def test_files_that_disagree_are_refused(
    kind: str, command: str, models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    damage, message = WRONG[kind]
    damage(models.tuned[0])
    out = tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "plan": [recipe],
        "merge": [recipe, out],
        "sweep": [recipe, out, "--lambda", "0.5"],
        "lora": [_over(models.tuned[0], models.base, tmp_path), out],
    }
    failed = run(command, *arguments[command])
    assert failed.exit_code == 1, failed.output
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (out / "config.json").exists()


def _over(base: Path, sound: Path, folder: Path) -> Path:
    """Write a recipe with an adapter over a base that cannot be loaded, trained on another."""
    adapter = made.save_adapter(sound, folder / "adapter", 1, target_modules=["q_proj"])
    return made.write(made.recipe(base, [f"{base}+{adapter}"]), folder / "lora.yml")


@pytest.mark.parametrize(
    "kind", ["two shards", "no shard", "another shard", "not in the index", "single file beside"]
)
def test_the_hosts_command_refuses_what_it_would_misread(
    kind: str, models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    """The host parses the index before we are asked, so damage to the index itself is its own."""
    damage, message = WRONG[kind]
    damage(models.tuned[0])
    with pytest.raises(STFError, match=re.escape(message)):
        merged_by_the_host(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_stray_files_are_not_read(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    """A shard that no index names, another format, a cache: none of them is part of the model."""
    assert run("merge", recipe, tmp_path / "clean", "--quiet").exit_code == 0
    noise = {name: torch.full_like(x, 7) for name, x in tensors_of(models.base).items()}
    for folder in (models.base, models.tuned[0]):
        save_file(noise, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
        torch.save(noise, folder / "pytorch_model.bin")
        (folder / ".cache").mkdir()
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "clean")
    assert all(found[name].equal(wanted[name]) for name in wanted)
    names = {file.name for model in read_lock(tmp_path / "out").models for file in model.files}
    assert not names & {"model-00001-of-00002.safetensors", "pytorch_model.bin"}


def test_an_index_may_name_a_single_file(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    """Some programs write an index also where one file holds everything."""
    assert run("merge", recipe, tmp_path / "clean", "--quiet").exit_code == 0
    places = dict.fromkeys(tensors_of(models.base), "model.safetensors")
    (models.base / INDEX).write_text(json.dumps({"weight_map": places}))
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "clean")
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_a_changed_shard_or_index_is_verified(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    assert run("verify", tmp_path / "out").exit_code == 0
    for name in (INDEX, "model-00002-of-00003.safetensors"):
        path = models.tuned[0] / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        found = run("verify", tmp_path / "out")
        assert found.exit_code == 3
        assert f"input {models.tuned[0]}: {name}: other bytes" in found.stdout
        path.write_bytes(before)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_snapshot_of_the_hub_is_a_local_folder(
    source: Checkpoints, layout: str, tmp_path: Path
) -> None:
    """Its path looks like that of a commit, and names a folder nonetheless."""
    snapshots = tmp_path / "hub" / "models--some--base" / "snapshots"
    base = lay_out(shutil.copytree(source.base, snapshots / ("c" * 40)), layout)
    recipe = write_recipe(tmp_path / "r.yml", Checkpoints(base, source.tuned))
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    verified = run("verify", tmp_path / "out", "--rebuild")
    assert verified.exit_code == 0, verified.output


def pipe(path: Path) -> None:
    os.mkfifo(path)


def plug(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        os.fchdir(here)  # the path of a socket is short
        server.bind(path.name)
        os.close(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


KINDS = {"a pipe": pipe, "a socket": plug, "a device": device, "a directory": folder}
FILES = ["model.safetensors", INDEX, "config.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes among its files")
@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_no_file_does_not_hang(
    kind: str,
    name: str,
    models: Checkpoints,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (kind, name) == ("a directory", "tokenizer.json"):
        pytest.skip("a folder of that name is of no consequence to our reading")
    monkeypatch.chdir(tmp_path)
    target = models.tuned[0] if name == INDEX else models.base
    (target / name).unlink(missing_ok=True)
    KINDS[kind](target / name)
    failed = run("plan", recipe)
    assert failed.exit_code == 1, failed.output
    assert f"{target / name} is {kind}" in failed.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes among its files")
def test_recipes_and_adapters_that_are_pipes(models: Checkpoints, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yml")
    failed = run("plan", tmp_path / "r.yml")
    assert failed.exit_code == 1
    assert "r.yml is a pipe (FIFO); put an ordinary file in its place" in failed.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        adapter = made.save_adapter(models.base, tmp_path / name, 1, target_modules=["q_proj"])
        (adapter / name).unlink()
        os.mkfifo(adapter / name)
        content = made.recipe(models.base, [f"{models.base}+{adapter}"])
        recipe = made.write(content, tmp_path / "lora.yml")
        for command in (["lora", recipe, tmp_path / "out"], ["merge", recipe, tmp_path / "out"]):
            failed = run(*command)
            assert failed.exit_code == 1, failed.output
            assert name in failed.stderr


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "num_labels"])
def test_counts_beyond_the_checkpoint_are_refused_at_once(
    key: str, models: Checkpoints, recipe: Path
) -> None:
    settings = json.loads((models.base / "config.json").read_text())
    for given in ({key: 10**9}, {"text_config": {key: 10**9}}, {"depths": [2, 10**9]}):
        (models.base / "config.json").write_text(json.dumps(settings | given))
        failed = run("plan", recipe)
        assert failed.exit_code == 1
        assert "is 1e+09, and the checkpoint holds 21 weights" in failed.stderr


def test_a_file_with_other_things_than_tensors(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    path = models.base / "pytorch_model.bin"
    tensors = load_file(models.base / "model.safetensors")
    (models.base / "model.safetensors").unlink()
    for content in ({"state_dict": tensors}, [1], {"a": 1}):
        torch.save(content, path)
        failed = run("plan", recipe)
        assert failed.exit_code == 1, failed.output
        assert f"{path} holds other things than tensors" in failed.stderr


def test_thousands_of_missing_models_are_told_at_once(tmp_path: Path) -> None:
    models = [{"model": f"/nowhere/m{number}"} for number in range(3000)]
    content = {"merge_method": "stf", "base_model": "/nowhere/base", "models": models}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(content))
    failed = run("plan", tmp_path / "r.yml")
    assert failed.exit_code == 1
    assert "3001 problems" in failed.stderr
    assert len(failed.stderr.splitlines()) < 200
