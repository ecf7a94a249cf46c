"""The folder of an output: what it may replace, and that no moment loses the old or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints import files
from mergekit_stf.host.outputs import out_folder, publish, workspace
from mergekit_stf.host.outputs.workspace import Workspace
from mergekit_stf.host.provenance.lock import make_lock, write_lock
from mergekit_stf.host.store import entry as store_entry
from mergekit_stf.host.store.store import Store
from tests.processes import CONTEXT

TRACED = {module.__file__ for module in (publish, workspace)}
Tracer = Callable[[FrameType, str, Any], Any]


def write_output(folder: Path, text: str) -> Path:
    """Write what a merge writes: a file and the lock that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").write_text(text)
    write_lock(make_lock("merge_method: stf", MergeOptions(), [], {}, folder), folder)
    return folder


def read(folder: Path) -> str:
    """Return the text of a complete output."""
    out_folder.check_earlier(folder)
    return (folder / "model").read_text()


def merge(
    out: Path, force: bool = True, meanwhile: Callable[[], None] = lambda: None, **options: Any
) -> None:
    with Workspace(out, force, **options) as work:
        write_output(work.output, "new")
        meanwhile()
        work.publish()


@pytest.fixture(params=["exchange", "order"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Publish by one exchange, and by two renames where the system has no exchange."""
    if request.param == "order":
        monkeypatch.setattr(publish, "_renameat2", lambda: None)
    elif publish._renameat2() is None:
        pytest.skip("this system has no renameat2")
    return request.param


def test_an_earlier_output_is_exchanged(way: str, tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", "old")
    merge(out)
    assert read(out) == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    if publish._renameat2() is None:
        pytest.skip("this system has no renameat2")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert publish.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        publish.exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("number", sorted(publish.UNSUPPORTED))
def test_a_file_system_without_exchange_is_told_from_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        publish.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(publish, "_renameat2", lambda: refuse)
    merge(write_output(tmp_path / "out", "old"))
    assert read(tmp_path / "out") == "new"


class Count:
    """A tracer that acts at one line of publishing, counted from its beginning."""

    def __init__(self, act: Callable[[], None], at: int) -> None:
        self.act, self.at, self.lines = act, at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Tracer | None:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.act()
        return self

    def run(self, out: Path) -> None:
        """Merge, the lines from `publish` to the end of the workspace counted."""
        before = sys.gettrace()
        try:
            with Workspace(out, force=True) as work:
                write_output(work.output, "new")
                sys.settrace(self)
                work.publish()
        finally:
            sys.settrace(before)


def steps(tmp_path: Path) -> range:
    counting = Count(lambda: None, 0)
    counting.run(write_output(tmp_path / "counted", "old"))
    assert counting.lines > 30
    return range(1, counting.lines + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_step_of_publishing(way: str, tmp_path: Path, number: int) -> None:
    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, terminate)
    results, silent = set(), 0
    try:
        for step in steps(tmp_path):
            out = write_output(tmp_path / f"{step}" / "out", "old")
            with pytest.raises(KeyboardInterrupt) as caught:
                Count(lambda: signal.raise_signal(number), step).run(out)
            done = read(out) == "new"
            expected = f"{out} is complete." if done else f"{out} is as it was;"
            said = getattr(caught.value, "__notes__", [])
            assert all(note.startswith(expected) for note in said)
            silent += not said
            assert not said or [path.name for path in out.parent.iterdir()] == ["out"]
            results.add(done)
    finally:
        signal.signal(number, before)
    assert results == {True, False}
    assert silent <= 1  # the instant before `__exit__` can do anything


def killed(out: Path, step: int, ordered: bool) -> None:
    if ordered:
        publish._renameat2 = lambda: None
    Count(lambda: os.kill(os.getpid(), signal.SIGKILL), step).run(out)


@pytest.mark.slow
def test_a_kill_at_any_step_of_publishing(way: str, tmp_path: Path) -> None:
    for step in steps(tmp_path):
        out = write_output(tmp_path / f"{step}" / "out", "old")
        process = CONTEXT.Process(target=killed, args=(out, step, way == "order"))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        there = [path for path in (out, *out.parent.glob("*/old")) if path.exists()]
        assert read(there[0]) in ("old", "new")
        if not out.exists():
            with pytest.raises(STFError, match="is there already"), Workspace(out):
                pass
            assert read(out) == "old"
        merge(out)
        assert read(out) == "new"
        left = {path.name for path in out.parent.iterdir()} - {"out"}
        assert all(read(out.parent / name) == "old" for name in left)


@pytest.mark.parametrize("fails", ["first", "second"])
def test_a_rename_that_fails_leaves_the_old_output_and_says_where_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    out = write_output(tmp_path / "out", "old")
    monkeypatch.setattr(publish, "_renameat2", lambda: None)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        moves = {"first": self == out, "second": target == out and self.name != "old"}
        if moves[fails]:
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(STFError, match=f"the finished output lies in {out}.new: .*busy"):
        merge(out)
    assert read(out) == "old"
    assert read(tmp_path / "out.new") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new"]


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "precious").touch()


def a_file(out: Path) -> None:
    out.write_text("precious")


def a_link(out: Path) -> None:
    out.symlink_to("precious")


def another_output(out: Path) -> None:
    write_output(out, "precious")


@pytest.mark.parametrize("appear", [a_folder, a_file, a_link, another_output])
@pytest.mark.parametrize("empty", [True, False])
def test_what_appears_during_the_merge_stays(
    way: str, tmp_path: Path, appear: Callable[[Path], None], empty: bool
) -> None:
    out = tmp_path / "out"
    if empty:
        out.mkdir()

    def meanwhile() -> None:
        if empty:
            out.rmdir()
        appear(out)

    for name in ("out.new", "out.new-2"):
        with pytest.raises(STFError, match=f"the finished output lies in {tmp_path}/{name}: "):
            merge(out, False, meanwhile)
        assert read(tmp_path / name) == "new"
        if out.is_dir():
            assert {path.name for path in out.iterdir()} & {"precious", "model"}
            shutil.rmtree(out)
        else:
            assert out.is_symlink() or out.read_text() == "precious"
            out.unlink()
        if empty:
            out.mkdir()
    assert not (tmp_path / "out.stf-work").exists()


def test_what_appears_in_an_earlier_output_stays(way: str, tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", "old")
    with pytest.raises(STFError, match=r"out\.new: .*holds thesis, which stf.lock.json does not"):
        merge(out, True, (out / "thesis").touch)
    assert (out / "thesis").exists()
    assert read(tmp_path / "out.new") == "new"


def test_what_appears_at_the_last_moment_is_moved_aside(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_output(tmp_path / "out", "old")

    def late(*arguments: Any) -> Path | None:
        (out / "thesis").touch()
        return publish.put_in_place(*arguments)

    monkeypatch.setattr(workspace, "put_in_place", late)
    merge(out)
    assert read(out) == "new"
    assert (tmp_path / "out.old" / "thesis").exists()
    assert f"what was in {out} lies in {out}.old now" in caplog.text


def test_what_appears_at_the_last_moment_stays_without_force(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def late(*arguments: Any) -> Path | None:
        another_output(out)
        return publish.put_in_place(*arguments)

    monkeypatch.setattr(workspace, "put_in_place", late)
    with pytest.raises(STFError, match=rf"lies in {out}\.new: {out}: "):
        merge(out, force=False)
    assert read(out) == "precious"
    assert read(tmp_path / "out.new") == "new"


def refuse(out: Path, reads: list[Path] | None = None, force: bool = True) -> str:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(STFError) as caught:
        Workspace(out, force, reads or [])
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "thesis"])
def test_force_knows_an_earlier_output_by_its_lock(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis").touch()
    assert "not known to be an earlier output" in refuse(out)
    (out / "stf.lock.json").write_text(text)
    assert "not known to be an earlier output" in refuse(out)


def test_force_leaves_alone_what_the_lock_does_not_name(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", "old")
    (out / "stf-report.html").touch()
    (out / "stf-report").mkdir()
    (out / "stf-report" / "alpha.png").touch()
    Workspace(out, force=True)
    (out / "runs").mkdir()
    (out / "runs" / "checkpoint").touch()
    assert "holds runs/checkpoint, which stf.lock.json does not name" in refuse(out)


@pytest.mark.parametrize(
    ("place", "relation"),
    [("out", "is"), ("out/models/base", "contains"), (".", "lies in"), ("link/base", "contains")],
)
def test_force_never_replaces_what_the_merge_reads(
    tmp_path: Path, place: str, relation: str
) -> None:
    out = write_output(tmp_path / "root" / "out", "old")
    (tmp_path / "root" / "link").symlink_to(out)
    message = refuse(out, [tmp_path / "root" / place])
    assert message.startswith(f"{out} {relation} ")
    assert "which this merge uses" in message
    Workspace(out, True, [tmp_path / "root" / "other"])


@pytest.mark.parametrize("depth", ["", "below"])
def test_the_current_and_the_home_folder_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    out = write_output(tmp_path / "out", "old")
    (out / depth).mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(out / depth))
    assert refuse(out).endswith("your home folder; name another folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(out / depth)
    assert refuse(out).endswith("the current folder; name another folder")
    assert refuse(tmp_path / "out" / ".", force=False).endswith("name another folder")


def test_the_current_folder_stays_when_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(STFError, match="is the current folder"):
        Workspace(Path("."))


@pytest.mark.parametrize("store", ["out/store", "out", "out.stf-work/store", "out.stf-work"])
def test_a_store_in_the_output_is_refused(tmp_path: Path, store: str) -> None:
    with pytest.raises(STFError, match=r"--store .* lies in .*; name a folder outside of it"):
        Workspace(tmp_path / "out", store=tmp_path / store)


def test_an_output_in_the_store_is_not_replaced(tmp_path: Path) -> None:
    out = write_output(tmp_path / "store" / "out", "old")
    with pytest.raises(STFError, match=r"lies in .*store, which this merge uses"):
        Workspace(out, force=True, store=tmp_path / "store")


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "empty")
    merge(out)
    assert out.is_symlink()
    assert read(tmp_path / "disk" / "empty") == "new"
    merge(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dangling", "dangling is a link to nowhere, which is not there; make that folder"),
        ("~/out", "~ is not expanded here"),
        ("~someone", "~ is not expanded here"),
        ("/", "cannot be an output folder"),
        ("file", "is a file; name a folder"),
    ],
)
def test_places_that_can_be_no_output_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    Path("file").touch()
    with pytest.raises(STFError) as caught:
        Workspace(Path(name))
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.fixture(params=["tmpfs", "bind"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty mounted folder."""
    folder, other = tmp_path / "volume", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    what = ["-t", "tmpfs", "tmpfs"] if request.param == "tmpfs" else ["--bind", str(other)]
    mount = ["mount", *what, str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_mount_point_is_refused_at_once_and_works_below(volume: Path) -> None:
    assert refuse(volume) == (
        f"{volume} is a mount point and cannot be replaced; name a folder below it"
    )
    merge(volume / "out")
    assert [path.name for path in volume.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["", "output", "old", "adapters", "lock", "store"])
def test_a_prepared_link_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    for inner in ("output", "old", "adapters", "store"):
        (victim / inner).mkdir(parents=True)
        (victim / inner / "thesis").touch()
    work = tmp_path / "out.stf-work"
    if name:
        work.mkdir()
    (work / name if name else work).symlink_to(victim / name)
    before = sorted(victim.rglob("*"))
    with pytest.raises(STFError, match=r"is a link, where a merge makes files; remove it"):
        merge(tmp_path / "out")
    assert sorted(victim.rglob("*")) == before


def test_a_folder_of_the_users_by_the_work_folders_name_stays(tmp_path: Path) -> None:
    thesis = tmp_path / "out.stf-work" / "thesis"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(STFError, match="thesis is no file of a merge; move it"):
        merge(tmp_path / "out")
    assert thesis.exists()


def leave_entry(out: Path) -> None:
    """Leave what a killed merge leaves: a store with an entry."""
    store = out.with_name("out.stf-work") / "store"
    store.mkdir(parents=True)
    (store / "ab.stf.safetensors").touch()


def test_a_store_of_a_killed_merge_goes_with_the_success_of_another(tmp_path: Path) -> None:
    leave_entry(tmp_path / "out")
    merge(tmp_path / "out", store=tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_when_nothing_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "out.stf-work" / "store" / ".partial-x").mkdir(parents=True)
    with pytest.raises(RuntimeError), Workspace(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    leave_entry(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt) as caught, Workspace(tmp_path / "out"):
        raise KeyboardInterrupt
    assert "lies in" in caught.value.__notes__[0]
    assert [path.name for path in (tmp_path / "out.stf-work").rglob("*.safetensors")] == [
        "ab.stf.safetensors"
    ]


def test_what_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_output(tmp_path / "out", "old")

    def failing(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    merge(out, True, lambda: monkeypatch.setattr(workspace.shutil, "rmtree", failing))
    assert read(out) == "new"
    assert read(tmp_path / "out.old") == "old"
    assert f"{out}.stf-work could not be removed; nothing in it is needed" in caplog.text
    assert f"what was in {out} lies in {out}.old now" in caplog.text


def test_a_failure_after_the_exchange_says_that_the_output_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_output(tmp_path / "out", "old")

    def failing(path: Path, forget: bool = False) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error", str(path))

    with pytest.raises(OSError, match="Input/output") as caught:
        merge(out, True, lambda: monkeypatch.setattr(workspace, "sync", failing))
    assert caught.value.__notes__ == [f"{out} is complete."]
    assert read(out) == "new"


@pytest.mark.skipif(os.name == "nt", reason="tests what Windows does by itself")
def test_a_file_is_synced_where_only_what_is_open_for_writing_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_windows_does(descriptor: int) -> None:
        os.pwrite(descriptor, b"", 0)

    monkeypatch.setattr(files, "TO_SYNC", os.O_RDWR)
    monkeypatch.setattr(os, "fsync", as_windows_does)
    (tmp_path / "file").write_text("kept")
    files.sync(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    monkeypatch.setattr(files, "TO_SYNC", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.sync(tmp_path / "file")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files and folders that are synced, in their order."""
    found: list[Path] = []

    def remember(path: Path, forget: bool = False) -> None:
        found.append(path)

    for module in (files, workspace, store_entry):
        monkeypatch.setattr(module, "sync", remember)
    return found


def test_files_and_their_folders_are_synced_before_they_count(
    tmp_path: Path, synced: list[Path]
) -> None:
    out = tmp_path / "deep" / "out"
    with Workspace(out) as work:
        write_output(work.output, "new")
        (work.output / "sub").mkdir()
        (work.output / "sub" / "file").touch()
        everything = {work.output, *work.output.rglob("*")}
        synced_before = [*synced]
        work.publish()
    assert {tmp_path, out.parent, work.folder} <= set(synced_before)
    published = synced[len(synced_before) :]
    assert set(published) == {*everything, out.parent}
    assert published[-2:] == [work.output, out.parent]


def test_an_entry_and_its_folder_are_synced(tmp_path: Path, synced: list[Path]) -> None:
    import torch

    store = Store(tmp_path / "a" / "store")
    assert synced == [tmp_path, tmp_path / "a"]
    store.put("ab", torch.ones(2, 2))
    assert synced[-2].name == "ab.stf.safetensors"
    assert synced[-1] == store.folder


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.sync(tmp_path / "file")
    if number == errno.EINVAL:
        files.sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync(tmp_path)
