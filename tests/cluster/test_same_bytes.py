"""A merge on three nodes writes the bytes of a merge in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_stf.host.diagnostics import records
from tests.cli.merges import run, tiny_models, write_recipe
from tests.cluster import clusters
from tests.host.models import Checkpoints
from tests.host.peft_adapters import save_adapter
from tests.test_faults import digest

pytestmark = clusters.pytestmark


def both(name: str, *arguments: object, folder: Path) -> tuple[Path, Path]:
    """Run a command in one process and on the cluster; return the outputs, of the same name."""
    outputs = folder / "here" / "out", folder / "there" / "out"
    for out, how in zip(outputs, ((), ("--ray", "auto")), strict=True):
        out.parent.mkdir()
        done = run(name, arguments[0], out, *arguments[1:], *how, "--quiet")
        assert done.exit_code == 0, done.output
    return outputs


def assert_same(here: Path, there: Path) -> None:
    """Compare all files but the lock and the records, which tell where a weight was merged."""
    assert {**digest(here), "stf.lock.json": ""} == {**digest(there), "stf.lock.json": ""}


@pytest.mark.usefixtures("three", "one_thread")
def test_a_dense_model_in_shards(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models", "llama", layout="sharded")
    recipe = write_recipe(tmp_path / "r.yml", models, density=0.5)
    here, there = both("merge", recipe, "--out-shard-size", "2000", folder=tmp_path)
    assert len(list(there.glob("*.safetensors"))) > 3
    assert_same(here, there)
    merged = {record.name: record for record in records.read_records(there / records.FILE_NAME)}
    assert merged.keys() == {r.name for r in records.read_records(here / records.FILE_NAME)}
    assert len({record.node for record in merged.values()}) >= 2
    lock = json.loads((there / "stf.lock.json").read_text())
    assert len(lock["workers"]) == 1
    done = run("verify", there, "--rebuild")  # in this process
    assert done.exit_code == 0, done.output


@pytest.mark.usefixtures("three", "one_thread")
def test_a_mixture_of_experts(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models", "mixtral")
    assert_same(*both("merge", write_recipe(tmp_path / "r.yml", models), folder=tmp_path))


@pytest.mark.usefixtures("three", "one_thread")
def test_adapters(tmp_path: Path) -> None:
    base = tiny_models(tmp_path / "models").base
    adapters = [
        save_adapter(base, tmp_path / f"a{seed}", seed, target_modules=["q_proj", "up_proj"])
        for seed in (1, 2)
    ]
    models = Checkpoints(base, tuple(Path(f"{base}+{adapter}") for adapter in adapters))
    recipe = write_recipe(tmp_path / "r.yml", models)
    assert_same(*both("merge", recipe, folder=tmp_path))


@pytest.mark.usefixtures("three", "one_thread")
def test_a_sweep_merges_each_matrix_once(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models", "gpt2")
    recipe = write_recipe(tmp_path / "r.yml", models)
    here, there = both("sweep", recipe, "--lambda", "0.5,1", "--keep-store", folder=tmp_path)
    points = sorted(path.name for path in here.iterdir() if path.is_dir() and path.name[0] != ".")
    assert len(points) == 2
    for point in points:
        assert_same(here / point, there / point)
    stored = [{path.name for path in (out / ".store").iterdir()} for out in (here, there)]
    assert stored[0] == stored[1]


@pytest.mark.usefixtures("three", "one_thread")
def test_a_method_of_the_host_stays_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = tiny_models(tmp_path / "models")
    recipe = write_recipe(tmp_path / "r.yml", models, density=0.5, weight=1.0)
    recipe.write_text(recipe.read_text().replace("merge_method: stf", "merge_method: ties"))
    assert_same(*both("merge", recipe, folder=tmp_path))
    assert "this merge method has no weights for a cluster" in caplog.text


@pytest.mark.usefixtures("three", "one_thread")
def test_a_plan_says_how_long_the_cluster_takes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", tiny_models(tmp_path / "models"))
    done = run("plan", recipe, "--ray", "auto", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    times = {int(places): seconds for places, seconds in found["cluster"]["by_places"].items()}
    assert found["cluster"]["places"] == len(found["cluster"]["nodes"]) == 3
    assert times[1] == pytest.approx(found["estimate"]["seconds"])
    assert times[2] >= found["cluster"]["seconds"] >= times[4]


@pytest.mark.usefixtures("three", "one_thread")
def test_a_rebuild_on_the_cluster(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", tiny_models(tmp_path / "models"))
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    done = run("verify", tmp_path / "out", "--rebuild", "--ray", "auto")
    assert done.exit_code == 0, done.output
    assert "merged again to the same bytes" in done.output
