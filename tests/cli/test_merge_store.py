"""Merges over a store that others own, that nobody may write to, or that was forged."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_stf.host.store import entry as store_entry
from mergekit_stf.host.store.entry import write_entry
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.models import Checkpoints

ENTRIES = "*.stf.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its merge, and the store of that merge."""
    root = tmp_path_factory.mktemp("made")
    recipe = write_recipe(root / "r.yml", tiny_models(root / "models"))
    done = run("merge", recipe, root / "out", "--quiet", "--store", root / "store")
    assert done.exit_code == 0, done.output
    return root


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_read_only_store_with_every_entry_serves(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the system refuses on a disk that is read-only, or where entries are somebody else's."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(store_entry, "save_file", refuse)
    done = run("merge", made / "r.yml", tmp_path / "out", "--store", made / "store")
    assert done.exit_code == 0, done.output
    assert "14 matrices found, 0 written" in done.output
    assert "computed again" not in caplog.text
    assert weights(tmp_path / "out") == weights(made / "out")


def forge_note(path: Path) -> None:
    rewrite(path, note="no record")


def forge_tasks(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        note = file.metadata()["note"]
    rewrite(path, note=note.replace('"kept":[', '"kept":[1,').replace("[]", "[{}]"))


def forge_shape(path: Path) -> None:
    rewrite(path, matrix=torch.zeros(1))


def forge_type(path: Path) -> None:
    rewrite(path, matrix=load_file(path)["M"].to(torch.int8))


def put_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def rewrite(path: Path, matrix: torch.Tensor | None = None, note: str | None = None) -> None:
    """Write an entry anew with a right checksum."""
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    matrix = load_file(path)["M"] if matrix is None else matrix
    write_entry(path, known["key"], matrix, known["note"] if note is None else note)


@pytest.mark.parametrize("forge", [forge_note, forge_tasks, forge_shape, forge_type, put_folder])
def test_a_forged_entry_is_computed_again(
    made: Path, tmp_path: Path, forge: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made / "store", tmp_path / "store")
    for path in (tmp_path / "store").glob(ENTRIES):
        forge(path)
    options = ("--quiet", "--store", tmp_path / "store")
    done = run("merge", made / "r.yml", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert "computed again" in caplog.text
    assert weights(tmp_path / "out") == weights(made / "out")


@pytest.mark.parametrize("place", ["out", "out/store", "out.stf-work", "out.stf-work/x", "link/s"])
def test_a_store_that_the_merge_would_remove_is_refused(
    made: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    done = run("merge", made / "r.yml", tmp_path / "out", "--store", tmp_path / place)
    assert done.exit_code == 1
    assert "; name a folder outside of it" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


def permuted(models: Checkpoints, axis: int) -> Checkpoints:
    """Give two models the same numbers in other places, moved by whole words of eight bytes."""
    first, second, third = models.tuned
    state = load_file(first / "model.safetensors")
    moved = {
        name: tensor.roll(2, min(axis, tensor.ndim - 1)).contiguous() if tensor.ndim else tensor
        for name, tensor in state.items()
    }
    save_file(moved, second / "model.safetensors", {"format": "pt"})
    return Checkpoints(models.base, (first, second, third))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_order_of_models_costs_no_byte_where_rows_or_columns_are_permuted(
    family: str, axis: int, tmp_path: Path
) -> None:
    models = permuted(tiny_models(tmp_path / "models", family), axis)
    merged = set()
    for number, order in enumerate(permutations(models.tuned)):
        recipe = write_recipe(tmp_path / f"{number}.yml", Checkpoints(models.base, order))
        done = run("merge", recipe, tmp_path / f"{number}", "--quiet", "--no-copy-tokenizer")
        assert done.exit_code == 0, done.output
        merged.add(weights(tmp_path / f"{number}"))
    assert len(merged) == 1
