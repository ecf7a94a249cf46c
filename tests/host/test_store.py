"""The store: what is put comes back, and what is damaged never does."""

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.store import entry as store_entry
from mergekit_stf.host.store import store as module
from mergekit_stf.host.store.store import Store, store_of_environment


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def take(store: Store, key: str) -> torch.Tensor | None:
    return store.get(key, lambda matrix, note: matrix)


def entry(store: Store) -> Path:
    (path,) = (p for p in store.folder.iterdir() if not p.name.startswith("."))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_put_comes_back(store: Store, dtype: torch.dtype) -> None:
    matrix = torch.randn(5, 7, dtype=dtype).T
    assert take(store, "ab") is None
    store.put("ab", matrix)
    found = take(store, "ab")
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, matrix)
    assert (store.hits, store.written) == (1, 1)
    assert [p.name for p in store.folder.iterdir()] == ["ab.stf.safetensors"]


def test_a_note_comes_back_with_its_matrix_and_is_checked_like_it(store: Store) -> None:
    store.put("ab", torch.ones(2, 2), "kept: 2")
    assert store.get("ab", lambda matrix, note: note) == "kept: 2"
    entry(store).write_bytes(entry(store).read_bytes().replace(b"kept: 2", b"kept: 3"))
    assert take(store, "ab") is None
    assert store.rejected == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_foreign(path: Path) -> None:
    path.write_text("not ours")


@pytest.mark.parametrize("damage", [truncate, empty, make_foreign])
def test_damaged_entries_are_said_and_removed(
    store: Store, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("ab", torch.randn(8, 8))
    damage(entry(store))
    assert take(store, "ab") is None
    assert "ab.stf.safetensors is damaged and will be computed again" in caplog.text
    assert store.rejected == 1
    store.put("ab", torch.eye(3))
    assert torch.equal(take(store, "ab"), torch.eye(3))


def test_no_flipped_byte_changes_a_matrix(store: Store) -> None:
    matrix = torch.randn(3, 5)
    store.put("ab", matrix)
    good = entry(store).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x41
        path = store.folder / "ab.stf.safetensors"
        path.write_bytes(bad)
        found = take(store, "ab")
        assert found is None or torch.equal(found, matrix)


def test_an_entry_under_another_name_is_refused(store: Store) -> None:
    store.put("ab", torch.eye(2))
    entry(store).rename(store.folder / "cd.stf.safetensors")
    assert take(store, "cd") is None
    assert store.rejected == 1


def test_an_entry_that_does_not_fit_is_removed(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(matrix: torch.Tensor, note: str) -> None:
        raise ValueError(f"no {note}")

    store.put("ab", torch.eye(2), "note of ours")
    assert store.get("ab", refuse) is None
    assert "ab.stf.safetensors is damaged and will be computed again: no note" in caplog.text
    assert list(store.folder.iterdir()) == []
    assert store.hits == 0


def test_a_time_that_cannot_be_set_is_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    store.put("ab", torch.eye(2))
    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(take(store, "ab"), torch.eye(2))
    assert (store.hits, store.rejected, caplog.text) == (1, 0, "")


def test_the_entry_of_another_user_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    store.put("ab", torch.eye(2))
    before = entry(store).read_bytes()
    monkeypatch.setattr(module, "read_entry", refuse)
    assert take(store, "ab") is None
    assert "cannot be read (Permission denied); its weight is computed again" in caplog.text
    store.put("ab", torch.eye(3))
    assert entry(store).read_bytes() == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_entry(
    store: Store, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    make(store.folder / "ab.stf.safetensors")
    assert take(store, "ab") is None
    assert "it is no file" in caplog.text
    store.put("ab", torch.eye(3))
    found = take(store, "ab")
    assert torch.equal(found, torch.eye(3)) if make is os.mkfifo else found is None


def test_what_cannot_be_removed_makes_no_room_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    Store(tmp_path).put("01", torch.zeros(100))
    monkeypatch.setattr(Path, "unlink", refuse)
    store = Store(tmp_path, size=1000)
    store.put("02", torch.zeros(100))
    assert (store.skipped, store.written) == (1, 0)


def test_size_is_bounded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Store(tmp_path)
    old.put("01", torch.zeros(100))
    old.put("02", torch.zeros(100))
    store = Store(tmp_path, size=1900)
    store.put("03", torch.ones(100))
    assert take(old, "01") is None
    assert take(old, "02") is not None
    store.put("04", torch.ones(100))
    assert caplog.text == ""
    store.put("05", torch.ones(100))
    store.put("06", torch.ones(100))
    assert store.skipped == 2
    assert caplog.text.count("is full") == 1
    assert take(store, "03") is not None
    assert "at most" in store.summary()


def test_a_full_disk_is_one_clear_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_entry, "save_file", full)
    with pytest.raises(STFError, match="no space left on the disk; free some space and run"):
        store.put("ab", torch.eye(2))
    assert list(store.folder.iterdir()) == []


def test_beside_the_merge_entries_are_complete_when_asked_for_and_at_the_end(store: Store) -> None:
    matrices = {f"{k:02x}": torch.randn(300, 300) for k in range(8)}
    with store.writing_beside():
        for key, matrix in matrices.items():
            store.put(key, matrix)
            assert torch.equal(take(store, key), matrix)
        store.put("ff", torch.eye(3))
    assert len(list(store.folder.iterdir())) == store.written == 9


def test_beside_the_merge_the_next_entry_waits_for_the_one_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write = module.write_entry

    def slow(path: Path, key: str, *rest: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.05)
        write(path, key, *rest)
        order.append(key)

    monkeypatch.setattr(module, "write_entry", slow)
    with store.writing_beside():
        store.put("01", torch.eye(2))
        order.append("put")
        store.put("02", torch.eye(2))
        assert order[:2] == ["put", "01"]
    assert order == ["put", "01", "02"]


def put_beside(store: Store, *keys: str, error: Exception | None = None) -> None:
    with store.writing_beside():
        for key in keys:
            store.put(key, torch.eye(2))
        if error:
            raise error


def test_beside_the_merge_an_error_of_writing_ends_the_merge(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def full(*_: object) -> None:
        tried.append(_)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_entry, "save_file", full)
    for keys in (["01"], ["01", "02", "03"]):
        tried.clear()
        with pytest.raises(STFError, match="no space left on the disk"):
            put_beside(store, *keys)
        assert len(tried) == 1
    with pytest.raises(ZeroDivisionError):
        put_beside(store, "01", error=ZeroDivisionError())
    assert store.written == 0


def test_clear_leaves_what_is_not_ours(store: Store) -> None:
    store.put("ab", torch.eye(2))
    (store.folder / ".partial-x").mkdir()
    (store.folder / ".partial-x" / "half").touch()
    (store.folder / "notes.txt").touch()
    store.clear()
    assert [p.name for p in store.folder.iterdir()] == ["notes.txt"]
    (store.folder / "notes.txt").unlink()
    store.clear()
    assert not store.folder.exists()


def test_old_leftovers_are_removed(store: Store) -> None:
    for name, age in (("old", 2 * module.DAY), ("new", 0)):
        folder = store.folder / f".partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    Store(store.folder)
    assert [path.name for path in store.folder.iterdir()] == [".partial-new"]


def test_the_environment_names_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEKIT_STF_STORE", raising=False)
    assert store_of_environment() is None
    monkeypatch.setenv("MERGEKIT_STF_STORE", str(tmp_path / "named"))
    named = store_of_environment()
    assert named is not None
    assert (named.folder, named.size) == (tmp_path / "named", module.DEFAULT_SIZE)
    monkeypatch.setenv("MERGEKIT_STF_STORE_SIZE", "1000")
    small = store_of_environment()
    assert small is not None
    assert small.size == 1000
    monkeypatch.setenv("MERGEKIT_STF_STORE_SIZE", "much")
    with pytest.raises(STFError, match="MERGEKIT_STF_STORE_SIZE is a number of bytes; got 'much'"):
        store_of_environment()


def hammer(folder: Path, seed: int) -> None:
    store = Store(folder)
    for round_ in range(60):
        key = f"{(round_ + seed) % 7:02x}"
        found = take(store, key)
        assert found is None or torch.equal(found, torch.full((50, 50), float(int(key, 16))))
        store.put(key, torch.full((50, 50), float(int(key, 16))))
    assert store.rejected == 0


def test_two_processes_on_one_store_do_no_harm(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(tmp_path, seed)) for seed in (0, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 7
