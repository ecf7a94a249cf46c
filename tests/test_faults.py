"""A merge that is killed, starved, lied to or interrupted is as good as one that is not."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mergekit_stf.cli.main import main
from mergekit_stf.core.features import Features
from tests.host.models import Checkpoints, save_family
from tests.processes import run, start

decompose = importlib.import_module("mergekit_stf.core.features.decompose")

KILLS = 20
ENTRIES = "*.stf.safetensors"
MATRICES = 16  # two of them trimmed sums


def write_recipe(path: Path, models: Checkpoints) -> Path:
    tuned = "".join(f"  - model: {model}\n" for model in models.tuned)
    path.write_text(
        f"merge_method: stf\nbase_model: {models.base}\nmodels:\n{tuned}"
        "parameters: {density: 0.5, lambda: 0.9}\n"
    )
    return path


def digest(out: Path) -> dict[str, str]:
    """Return the digest of every file but the diagnostics, which hold times."""
    files = [path for path in sorted(out.iterdir()) if path.suffix != ".jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counts(text: str) -> tuple[int, int]:
    """Return how many matrices a merge found in its store, and how many it wrote."""
    match = re.search(r"(\d+) matrices found, (\d+) written", text)
    assert match, text
    return int(match[1]), int(match[2])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_family("llama", tmp_path_factory.mktemp("models"), tasks=2)


@pytest.fixture(scope="module")
def recipe(models: Checkpoints) -> Path:
    return write_recipe(models.base.parent / "recipe.yml", models)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The files of an uninterrupted merge, and how long it takes once all is warm."""
    folder = tmp_path_factory.mktemp("whole")
    run("merge", recipe, folder / "warm", log=folder / "log")
    started = time.monotonic()
    code, text = run("merge", recipe, folder / "out", log=folder / "log")
    seconds = time.monotonic() - started
    assert code == 0, text
    assert counts(text) == (0, MATRICES)
    assert not (folder / "out.stf-work").exists()
    return digest(folder / "out"), seconds


@pytest.fixture
def own(models: Checkpoints, tmp_path: Path) -> tuple[Checkpoints, Path]:
    """A copy of the models that a test may damage, and its recipe."""
    root = tmp_path / "models"
    shutil.copytree(models.base.parent, root)
    tuned = tuple(root / model.name for model in models.tuned)
    copy = Checkpoints(root / models.base.name, tuned)
    return copy, write_recipe(tmp_path / "own.yml", copy)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def interrupted(recipe: Path, out: Path, log: Path, number: int) -> tuple[int, str]:
    """Send a signal to a merge that has finished some of its weights."""
    running = start("merge", recipe, out, log=log)
    running.until(out.parent / f"{out.name}.stf-work" / "store", ENTRIES)
    assert running.process.pid is not None
    os.kill(running.process.pid, number)
    code = running.wait()
    return code, running.text


@pytest.mark.slow
def test_killed_at_random_moments(
    recipe: Path, whole: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    files, seconds = whole
    moments = random.Random(5)
    resumed = 0
    for kill in range(KILLS):
        out = tmp_path / str(kill) / "out"
        out.parent.mkdir()
        running = start("merge", recipe, out, log=tmp_path / "log")
        time.sleep(moments.uniform(0, seconds))
        running.process.kill()
        running.wait()
        if out.exists():
            assert digest(out) == files
            continue
        finished = len(list((out.parent / "out.stf-work" / "store").glob(ENTRIES)))
        code, text = run("merge", recipe, out, log=tmp_path / "log")
        assert code == 0, text
        assert counts(text) == (finished, MATRICES - finished)
        assert digest(out) == files
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        resumed += finished > 0
    assert resumed >= 2


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_say_how_to_resume(
    recipe: Path,
    whole: tuple[dict[str, str], float],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    out = tmp_path / "out"
    code, text = interrupted(recipe, out, tmp_path / "log", number)
    assert code == expected, text
    assert f"lies in {tmp_path}/out.stf-work/store; run the same command again" in text
    assert "Traceback" not in text
    assert not out.exists()
    code, text = run("merge", recipe, out, log=tmp_path / "log")
    assert counts(text)[0] > 0
    assert digest(out) == whole[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "log"] == ["out"]


def test_a_disk_that_is_too_small_is_seen_before_the_merge(recipe: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(200_000))
    code, text = run("merge", recipe, disk / "out", log=disk.parent / "log")
    assert code == 1, text
    assert re.search(r"Error: .*/disk/out.stf-work: [\d.]+ kB needed .* make room", text)
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("room", [20_000, 50_000])
def test_a_disk_that_fills_up_ends_in_one_line_and_resumes(
    recipe: Path, whole: tuple[dict[str, str], float], disk: Path, room: int
) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room))
    log = disk.parent / "log"
    code, text = run("merge", recipe, disk / "out", log=log, pretend_free=True)
    assert code in (1, 4), text
    (line,) = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert "no space left" in line
    assert "Traceback" not in text
    assert not (disk / "out").exists()
    (disk / "filler").unlink()
    code, text = run("merge", recipe, disk / "out", log=log)
    assert code == 0, text
    assert counts(text)[0] > 0
    assert digest(disk / "out") == whole[0]


def test_a_read_only_output_is_one_line(recipe: Path, disk: Path) -> None:
    remount(disk, "ro")
    code, text = run("merge", recipe, disk / "out", log=disk.parent / "log")
    assert code == 1, text
    assert f"cannot write to {disk}/out.stf-work: Read-only file system" in text


def test_a_truncated_shard_is_seen_before_the_merge(
    own: tuple[Checkpoints, Path], tmp_path: Path
) -> None:
    checkpoints, recipe = own
    path = checkpoints.tuned[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, text = run("merge", recipe, tmp_path / "out", log=tmp_path / "log")
    assert code == 1
    assert f"{path} is damaged or truncated" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign"])
def test_a_damaged_store_is_computed_again(
    recipe: Path, whole: tuple[dict[str, str], float], tmp_path: Path, damage: str
) -> None:
    out, log, store = tmp_path / "out", tmp_path / "log", tmp_path / "store"
    assert run("merge", recipe, tmp_path / "first", "--store", store, log=log)[0] == 0
    victim, *_ = sorted(store.glob(ENTRIES))
    if damage == "flip":
        flip(victim, -5)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-5])
    else:
        save_file({"M": torch.eye(3)}, victim)
    code, text = run("merge", recipe, out, "--store", store, log=log)
    assert code == 0
    assert text.count(f"{victim} is damaged and will be computed again") == 1
    assert counts(text) == (MATRICES - 1, 1)
    assert digest(out) == whole[0]


def test_an_input_changed_between_crash_and_resume(
    own: tuple[Checkpoints, Path], tmp_path: Path
) -> None:
    checkpoints, recipe = own
    log = tmp_path / "log"
    assert interrupted(recipe, tmp_path / "out", log, signal.SIGKILL)[0] == -signal.SIGKILL
    path = checkpoints.tuned[0] / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][2, 3] += 1
    save_file(tensors, path, {"format": "pt"})
    assert run("merge", recipe, tmp_path / "out", log=log)[0] == 0
    assert run("merge", recipe, tmp_path / "fresh", log=log)[0] == 0
    resumed, fresh = digest(tmp_path / "out"), digest(tmp_path / "fresh")
    assert resumed["model.safetensors"] == fresh["model.safetensors"]


def test_an_input_changed_during_the_merge_is_refused(
    own: tuple[Checkpoints, Path], tmp_path: Path
) -> None:
    checkpoints, recipe = own
    running = start("merge", recipe, tmp_path / "out", log=tmp_path / "log")
    running.until(tmp_path / "out.stf-work" / "store", ENTRIES)
    (checkpoints.tuned[0] / "config.json").touch()
    assert running.wait() == 1
    assert "config.json was changed during the merge; run the same command again" in running.text
    assert not (tmp_path / "out").exists()


def test_two_merges_on_one_store_do_no_harm(
    recipe: Path, whole: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    outs = [tmp_path / name / "out" for name in "ab"]
    for out in outs:
        out.parent.mkdir()
    both = [
        start("merge", recipe, out, "--store", tmp_path / "store", log=out.parent / "log")
        for out in outs
    ]
    assert [running.wait() for running in both] == [0, 0]
    assert [digest(out) for out in outs] == [whole[0]] * 2


def test_two_merges_into_one_folder(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start("merge", recipe, out, log=tmp_path / "first")
    first.until(tmp_path / "out.stf-work" / "store", ENTRIES)
    code, text = run("merge", recipe, out, log=tmp_path / "second")
    assert code == 1
    assert "another merge is writing" in text or "is there already" in text
    assert first.wait() == 0


class Driver:
    """A decomposition that fails in some of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.calls = 0
        for name, way in list(decompose.WAYS.items()):
            monkeypatch.setitem(decompose.WAYS, name, self._wrap(way, fails))

    def _wrap(
        self, route: Callable[[torch.Tensor], Features], fails: Callable[[int], bool]
    ) -> Callable[[torch.Tensor], Features]:
        def wrapped(matrix: torch.Tensor) -> Features:
            self.calls += 1
            if fails(self.calls):
                raise RuntimeError("injected: the algorithm failed to converge")
            return route(matrix)

        return wrapped


def merge_here(recipe: Path, out: Path) -> Result:
    return CliRunner().invoke(main, ["merge", str(recipe), str(out)])


def test_a_driver_that_fails_once_is_said_and_survived(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        Driver(patch, lambda call: call == 5)
        with pytest.warns(RuntimeWarning, match=r"weight: decomposed by svd .*injected"):
            result = merge_here(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert merge_here(recipe, tmp_path / "whole").exit_code == 0
    merged, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    for name, expected in whole.items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_a_driver_that_always_fails_loses_nothing_that_is_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Driver(patch, lambda call: call > 6)
        result = merge_here(recipe, tmp_path / "out")
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "weight: no driver decomposes it" in line
    assert not (tmp_path / "out").exists()
    assert counts(merge_here(recipe, tmp_path / "out").output) == (5, MATRICES - 5)
    assert merge_here(recipe, tmp_path / "whole").exit_code == 0
    merged, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(merged[name], expected) for name, expected in whole.items())
