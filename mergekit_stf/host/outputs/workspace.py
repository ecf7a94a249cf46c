"""The folder beside the output in which a merge works until its result is complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import make_folder, sync
from mergekit_stf.host.outputs.out_folder import (
    check_earlier,
    check_free,
    check_store,
    out_folder,
    work_folder,
)
from mergekit_stf.host.outputs.publish import is_free, put_beside, put_in_place
from mergekit_stf.host.run.signals import add_note, defer_signals

LOG = logging.getLogger(__name__)
ENTRIES = "*.stf.safetensors"
OURS = frozenset({"output", "store", "adapters", "waiting", "old", "lock"})


class Workspace:
    """``OUT.stf-work``: the unfinished output, the store, and a lock that keeps others out.

    It lies beside the output, so that putting the finished result into place is one step. An
    error leaves the store there, from which the next run resumes; nothing else is left.

    Args:
        out: where the output belongs.
        force: replace an earlier output.
        reads: files and folders that the merge reads, which it must not replace.
        store: a folder of the user's for the store; None for one in this folder.
        keep_store: leave the store in this folder after a success too.

    Attributes:
        out: the output's place, links followed.
        folder: the folder itself.
        output: where to write the output until `publish`.
        store: where to keep the store.
        adapters: where the host may keep the full models that it makes of ``base+adapter``.
        waiting: where an executor may keep weights that are merged before it is their turn.

    Raises:
        STFError: ``out`` is taken, or can be no output.
    """

    def __init__(
        self,
        out: Path,
        force: bool = False,
        reads: Sequence[Path] = (),
        store: Path | None = None,
        keep_store: bool = False,
    ) -> None:
        self.out = out_folder(out)
        self.folder = work_folder(self.out)
        self.output = self.folder / "output" / self.out.name
        self.store = store or self.folder / "store"
        self.adapters = self.folder / "adapters"
        self.waiting = self.folder / "waiting"
        self._force, self._reads, self._keep_store = force, [*reads, self.store], keep_store
        self._old = self.folder / "old"
        self._lock = FileLock(self.folder / "lock", blocking=False)
        self._finished: Path | None = None
        if store is not None:
            check_store(store, self.out)
        self._check_free()

    def __enter__(self) -> Workspace:
        """Take the lock and remove what an interrupted merge has left of its output.

        Raises:
            STFError: another merge works here, or something is here that is no merge's.
        """
        try:
            with defer_signals():
                self._open()
            self._prepare()
        except Timeout as error:
            raise STFError(f"another merge is writing {self.out}; wait for it") from error
        except BaseException as error:
            if self._lock.is_locked:
                self.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, OSError):
                raise STFError(f"cannot write to {self.folder}: {error.strerror}") from error
            raise
        return self

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Bring what is written of the output to the disk while the block does something else."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            settled = pool.submit(self._settle)
            yield
            settled.result()

    def publish(self) -> None:
        """Put the finished output into place, its bytes safely on the disk before its name.

        An earlier output that it replaces is removed afterwards.

        Raises:
            STFError: something is at ``out`` that must stay; the message says where the finished
                output is.
        """
        self._settle()
        with defer_signals():
            try:
                self._check_free()
                old = put_in_place(self.output, self.out, self._old, self._force)
            except (STFError, OSError) as error:
                raise self._left_beside(error) from error
            self._finished = self.out
            sync(self.out.parent)
            if old is not None:
                self._remove_old(old)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what is of no more use, and say on an interruption what is kept."""
        try:
            with defer_signals():
                self._clean()
                if error is not None:
                    self._note(error)
        except BaseException as late:  # the user is in a hurry
            self._clean()
            self._note(late)
            raise

    def _check_free(self) -> None:
        check_free(self.out, self._force, self._reads)

    def _check_own(self) -> None:
        """Follow no link that somebody has prepared, and touch nothing that is no merge's."""
        inner = list(self.folder.iterdir()) if self.folder.is_dir() else []
        for path in (self.folder, *inner):
            if path.is_symlink():
                raise STFError(f"{path} is a link, where a merge makes files; remove it")
        for path in inner:
            if path.name not in OURS:
                raise STFError(
                    f"{path} is no file of a merge; move it, {self.folder} is where a merge works"
                )

    def _open(self) -> None:
        self._check_own()
        make_folder(self.folder)
        self._lock.acquire()

    def _prepare(self) -> None:
        self._check_own()
        self._recover()
        self._check_free()
        _remove(self.output.parent, self.adapters, self.waiting)
        self.output.mkdir(parents=True)
        sync(self.folder)

    def _recover(self) -> None:
        """Put back what a merge had moved aside that was killed before it could put in its own."""
        if not self._old.exists():
            return
        if is_free(self.out):
            put_in_place(self._old, self.out, self.output, replace=False)
        else:
            place = put_beside(self._old, self.out, "old")
            LOG.warning("a killed merge has replaced the output that now lies in %s", place)

    def _settle(self) -> None:
        for path in (*self.output.rglob("*"), self.output):
            sync(path)

    def _left_beside(self, error: STFError | OSError) -> STFError:
        """Keep the finished output under a name of its own, and say which."""
        self._finished = put_beside(self.output, self.out, "new")
        reason = error if isinstance(error, STFError) else f"{self.out}: {error.strerror}"
        if self._old.exists():
            old = put_beside(self._old, self.out, "old")
            reason = f"{reason}; what was there lies in {old}"
        return STFError(f"the finished output lies in {self._finished}: {reason}")

    def _remove_old(self, old: Path) -> None:
        try:
            check_earlier(old)
            shutil.rmtree(old)
        except (STFError, OSError) as error:
            place = put_beside(old, self.out, "old")
            LOG.warning("what was in %s lies in %s now: %s", self.out, place, error)

    def _clean(self) -> None:
        _remove(self.output.parent, self.adapters, self.waiting)
        if not self._has_store() or (self._finished and not self._keep_store):
            _remove(self.folder / "store")
            with suppress(OSError):  # Windows removes no open file
                (self.folder / "lock").unlink()
        self._lock.release()
        with suppress(OSError):  # a store is in it
            self.folder.rmdir()
        if self.folder.exists() and not self._has_store():
            LOG.warning("%s could not be removed; nothing in it is needed", self.folder)

    def _has_store(self) -> bool:
        return any((self.folder / "store").glob(ENTRIES))

    def _note(self, error: BaseException) -> None:
        if self._finished == self.out:
            add_note(error, f"{self.out} is complete.")
        elif isinstance(error, Exception):
            return
        elif any(self.store.glob(ENTRIES)):
            add_note(
                error,
                f"What is finished lies in {self.store}; run the same command again to resume.",
            )
        else:
            add_note(error, f"{self.out} is as it was; run the same command again to start anew.")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
