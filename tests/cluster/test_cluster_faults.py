"""A cluster in which drivers are killed, nodes die, or nodes lack something."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
from safetensors.torch import load_file, save_file

from mergekit_stf.host.diagnostics import records
from mergekit_stf.host.run.network import stay_offline
from tests.cli.merges import run, write_recipe
from tests.cluster import clusters
from tests.host.models import Checkpoints, llama, save_model
from tests.processes import start
from tests.test_faults import ENTRIES, counts, digest

pytestmark = clusters.pytestmark

SIZES = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3}
MATRICES = 21
PLACES = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Models that take seconds to merge, so that there is a middle."""
    return save_model(llama(**SIZES), tmp_path_factory.mktemp("models"), tasks=2)


@pytest.fixture(scope="module")
def recipe(models: Checkpoints) -> Path:
    return write_recipe(models.base.parent / "recipe.yml", models)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a merge in one process with one thread."""
    folder = tmp_path_factory.mktemp("whole")
    running = start("merge", recipe, folder / "out", "--quiet", log=folder / "log")
    assert running.wait() == 0, running.text
    return without_lock(folder / "out")


def without_lock(out: Path) -> dict[str, str]:
    return {**digest(out), "stf.lock.json": ""}


def stored(out: Path) -> int:
    return len(list((out.parent / f"{out.name}.stf-work" / "store").glob(ENTRIES)))


def stopped(recipe: Path, out: Path, log: Path, address: str, number: int) -> tuple[int, str]:
    """Send a signal to a merge on the cluster that has finished some of its weights."""
    running = start("merge", recipe, out, "--ray", address, log=log)
    running.until(out.parent / f"{out.name}.stf-work" / "store", ENTRIES, seconds=240)
    assert running.process.pid is not None
    os.kill(running.process.pid, number)
    return running.wait(), running.text


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_driver_resumes_from_its_store(
    three: Any,
    recipe: Path,
    whole: dict[str, str],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    out = tmp_path / "out"
    code, text = stopped(recipe, out, tmp_path / "log", three.address, number)
    assert code == expected, text
    if number == signal.SIGINT:
        assert "store; run the same command again to resume" in text
        assert "Traceback" not in text
    finished = stored(out)
    assert 0 < finished < MATRICES
    assert not out.exists()
    done = run("merge", recipe, out, "--ray", "auto")
    assert done.exit_code == 0, done.output
    assert counts(done.output) == (finished, MATRICES - finished)
    assert without_lock(out) == whole


@pytest.mark.usefixtures("one_thread")
def test_a_killed_node_is_done_without(
    three: Any, recipe: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Its process is killed when the merge has finished some weights."""
    out = tmp_path / "out"
    node = three.add_node(num_cpus=1, memory=4 * 10**9)

    def kill() -> None:
        end = time.monotonic() + 240
        while not stored(out) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = run("merge", recipe, out, "--ray", "auto")
    killer.join()
    three.remove_node(node, allow_graceful=False)
    assert done.exit_code == 0, done.output
    assert without_lock(out) == whole
    assert counts(done.output) == (0, MATRICES)
    merged = Counter(record.name for record in records.read_records(out / records.FILE_NAME))
    assert set(merged.values()) == {1}


def refused(three: Any, recipe: Path, out: Path, **variables: str) -> str:
    """Return the message of a merge on a cluster with one more node, of another environment."""
    node = three.add_node(num_cpus=1, memory=4 * 10**9, env_vars=variables)
    try:
        done = run("merge", recipe, out, "--ray", "auto", "--quiet")
    finally:
        three.remove_node(node)
    assert done.exit_code == 1, done.output
    assert not out.exists()
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    number = node.node_id[:6]
    assert f"/{number}: " in line
    return line


@pytest.mark.usefixtures("one_thread")
def test_a_node_without_a_model_is_refused(
    three: Any, hub: Path, models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a hub model, in the cache of every node but one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = hub / "models--somebody--base"
    shutil.copytree(models.base, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    recipe = write_recipe(tmp_path / "r.yml", Checkpoints(Path("somebody/base"), models.tuned))
    with stay_offline():
        line = refused(three, recipe, tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "empty"))
    assert f"commit {commit} of somebody/base is not in the cache" in line


@pytest.mark.usefixtures("one_thread")
def test_a_node_with_another_version_is_refused(three: Any, recipe: Path, tmp_path: Path) -> None:
    """Its Python finds another version of a library first."""
    metadata = tmp_path / "other" / "safetensors-99.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 99.9\n")
    line = refused(three, recipe, tmp_path / "out", PYTHONPATH=str(tmp_path / "other"))
    assert f"safetensors is 99.9 there and {safetensors.__version__} where the merge" in line


@pytest.mark.usefixtures("one_thread", "three")
def test_a_weight_that_no_node_has_memory_for_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_stf.host.executors.jobs.PROCESS", 10**11)
    done = run("merge", recipe, tmp_path / "out", "--ray", "auto", "--quiet")
    assert done.exit_code == 1
    assert "needs 100 GB of memory, and no node of the cluster gives more than 4 GB" in done.output


@pytest.mark.usefixtures("one_thread", "three")
def test_a_wrong_weight_fails_the_merge_by_its_name(models: Checkpoints, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.tuned[0], broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path / "r.yml", Checkpoints(models.base, (broken, models.tuned[1])))
    done = run("merge", recipe, tmp_path / "out", "--ray", "auto", "--quiet")
    assert done.exit_code == 1
    assert f"Error: {name}: {broken} has 1 entries that are NaN or infinite" in done.output
    assert not (tmp_path / "out").exists()
