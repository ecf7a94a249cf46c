"""The folder beside the output in which a merge works until its result is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import sync


class Workspace:
    """``OUT.stf-work``: the unfinished output, the store, and a lock that keeps others out.

    It lies beside the output, so that renaming the finished result into place is one step. An
    error leaves the store there, from which the next run resumes.

    Args:
        out: where the output belongs.
        force: replace an output that is there.

    Attributes:
        folder: the folder itself.
        output: where to write the output until `publish`.
        store: where to keep the store.
        adapters: where the host may keep the full models that it makes of ``base+adapter``.

    Raises:
        STFError: ``out`` is there already, or another merge is writing it.
    """

    def __init__(self, out: Path, force: bool = False) -> None:
        if not out.absolute().name:
            raise STFError(f"{out} cannot be an output folder")
        self.out = out = out.absolute()
        self.folder = _beside(out)
        self.output = self.folder / "output" / out.name
        self.store = self.store_of(out)
        self.adapters = self.folder / "adapters"
        self._old = self.folder / "old"
        self._lock = FileLock(self.folder / "lock", blocking=False)
        self._check_free(force)

    @staticmethod
    def store_of(out: Path) -> Path:
        """Return where the store of an unfinished merge into ``out`` lies."""
        return _beside(out) / "store"

    def __enter__(self) -> Workspace:
        """Take the lock and remove what an interrupted merge has left of its output."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._remove_unfinished()
            self.output.mkdir(parents=True)
        except Timeout as error:
            raise STFError(f"another merge is writing {self.out}; wait for it") from error
        except OSError as error:
            raise STFError(f"cannot write to {self.folder}: {error.strerror}") from error
        return self

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Bring what is written of the output to the disk while the block does something else."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            settled = pool.submit(self._settle)
            yield
            settled.result()

    def publish(self) -> None:
        """Put the finished output into place, its bytes safely on the disk before its name."""
        self._settle()
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.out.rename(self._old)
        self.output.rename(self.out)
        sync(self.out.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what is of no more use; a store that still holds something stays."""
        shutil.rmtree(self._old, ignore_errors=True)
        self._remove_unfinished()
        self._lock.release()
        if not self._has_store():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _settle(self) -> None:
        for path in self.output.rglob("*"):
            sync(path)

    def _remove_unfinished(self) -> None:
        for folder in (self.output.parent, self.adapters):
            shutil.rmtree(folder, ignore_errors=True)

    def _has_store(self) -> bool:
        return self.store.exists() and any(self.store.iterdir())

    def _check_free(self, force: bool) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise STFError(f"{self.out} is a file; name a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not force:
            raise STFError(f"{self.out} is there already; name another folder, or say --force")


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.stf-work")
