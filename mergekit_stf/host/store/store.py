"""Merged task matrices kept on disk while a merge runs, so that a killed merge resumes.

The matrix M of a weight, and the trimmed sum of an embedding, do not depend on λ, so one store
also serves a sweep over λ. An entry is one safetensors file, named by a digest of everything that
it depends on: the bytes of every input tensor, the options, and the versions and the machine's
traits that could change a bit of it. A changed input gives another name, never a wrong hit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import make_folder
from mergekit_stf.host.recipe.yaml_text import first_line
from mergekit_stf.host.store.entry import (
    HEADER,
    PARTIAL,
    read_entry,
    write_entry,
)
from mergekit_stf.host.store.writer import Writer

VARIABLE = "MERGEKIT_STF_STORE"
VARIABLE_SIZE = "MERGEKIT_STF_STORE_SIZE"
DEFAULT_SIZE = 64 * 10**9
SUFFIX = ".stf.safetensors"
DAY = 86_400.0

LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Store:
    """A folder of merged task matrices, safe to share between threads and processes.

    Args:
        folder: created when it is missing.
        size: most bytes that the entries may take; beyond it the entries that this process has
            not used go first, oldest first, and when none is left the rest is not stored.

    Attributes:
        hits: how many matrices were found.
        written: how many were stored.
        rejected: how many entries were damaged and removed.
        skipped: how many found no room.
    """

    def __init__(self, folder: Path, size: int = DEFAULT_SIZE) -> None:
        self.folder = folder
        self.size = size
        self.hits = self.written = self.rejected = self.skipped = 0
        self._used: set[str] = set()
        self._avoided: set[str] = set()
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        try:
            make_folder(folder)
        except OSError as error:
            raise STFError(f"cannot make the store {folder}: {error.strerror}") from error
        self._remove_partial(age=DAY)

    def get(self, key: str, read: Callable[[torch.Tensor, str], T]) -> T | None:
        """Return what ``read`` makes of the matrix and the note stored under ``key``, or None.

        An entry that is truncated, corrupted or foreign is removed, with a warning; one that
        belongs to somebody else, or that is no file, is left alone, with a warning.

        Args:
            key: the entry's name.
            read: takes the matrix, on the CPU, and the note; raises ValueError when they are not
                what belongs to the key.
        """
        path = self._path(key)
        if path.name in self._used:
            self.flush()
        try:
            found = read(*read_entry(path, key))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._avoid(path, f"cannot be read ({error.strerror or error})")
            return None
        except (SafetensorError, ValueError) as error:
            self._reject(path, error)
            return None
        with contextlib.suppress(OSError):  # somebody else's, or on a disk that is read-only
            os.utime(path)
        with self._lock:
            self.hits += 1
            self._used.add(path.name)
        return found

    def put(self, key: str, matrix: torch.Tensor, note: str = "") -> None:
        """Store a matrix and a text about it, complete or not at all.

        Inside `writing_beside` this returns before it is written.

        Args:
            key: the entry's name.
            matrix: not to be changed afterwards.
            note: the text.

        Raises:
            STFError: this or the entry before it could not be written, as the disk is full or the
                folder is read-only.
        """
        path = self._path(key)
        if path.name in self._avoided:
            return
        matrix = matrix.detach().cpu().contiguous()
        self.flush()
        with self._lock:
            if not self._make_room(matrix.nbytes + HEADER + len(note)):
                return
            self._used.add(path.name)
        write = partial(self._write, path, key, matrix, note)
        if self._writer is None:
            write()
        else:
            self._writer.start(write)

    def flush(self) -> None:
        """Wait until all entries are written.

        Raises:
            STFError: one could not be written.
        """
        if self._writer is not None:
            self._writer.wait()

    @contextlib.contextmanager
    def writing_beside(self) -> Iterator[None]:
        """Write entries in a thread of their own inside the block, at whose end all are written."""
        with Writer() as self._writer:
            try:
                yield
            finally:
                self._writer = None

    def _write(self, path: Path, key: str, matrix: torch.Tensor, note: str) -> None:
        try:
            write_entry(path, key, matrix, note)
        except (OSError, SafetensorError) as error:
            raise STFError(self._not_written(error)) from error
        with self._lock:
            self.written += 1

    def keys(self) -> frozenset[str]:
        """Return the keys of all entries."""
        return frozenset(path.name.removesuffix(SUFFIX) for path in self._entries())

    def clear(self) -> None:
        """Remove every entry and every leftover, and the folder when nothing else is in it."""
        self._remove_partial(age=0)
        for path in self._entries():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def summary(self) -> str:
        """Say in one line what the store did and what it takes."""
        return (
            f"store {self.folder}: {self.hits} matrices found, {self.written} written, "
            f"{self.count_bytes() / 1e6:.1f} MB of at most {self.size / 1e6:.0f} MB"
        )

    def count_bytes(self) -> int:
        """Return the bytes that all entries take."""
        return sum(stat.st_size for stat in map(_stat, self._entries()) if stat)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _entries(self) -> Iterator[Path]:
        return self.folder.glob(f"[0-9a-f]*{SUFFIX}")

    def _make_room(self, needed: int) -> bool:
        excess = self.count_bytes() + needed - self.size
        if excess <= 0:
            return True
        stale = [(s.st_mtime_ns, s.st_size, p) for p in self._entries() if (s := _stat(p))]
        for _, size, path in sorted(item for item in stale if item[2].name not in self._used):
            if _remove(path):
                excess -= size
            if excess <= 0:
                return True
        self.skipped += 1
        if self.skipped == 1:
            LOG.warning(
                "the store %s is full (%.0f MB): what follows is not stored, and a crash from here"
                " on costs it again; raise --store-size or %s",
                self.folder,
                self.size / 1e6,
                VARIABLE_SIZE,
            )
        return False

    def _reject(self, path: Path, error: Exception) -> None:
        """Remove a damaged entry, or leave it alone where that is not allowed."""
        self.rejected += 1
        if _remove(path):
            LOG.warning("%s is damaged and will be computed again: %s", path, first_line(error))
        else:
            self._avoid(path, f"is damaged and cannot be removed ({first_line(error)})")

    def _avoid(self, path: Path, reason: str) -> None:
        """Neither read nor replace an entry."""
        LOG.warning("%s %s; its weight is computed again and not stored", path, reason)
        with self._lock:
            self._avoided.add(path.name)

    def _remove_partial(self, age: float) -> None:
        """Remove what killed processes were writing, if it is older than ``age`` seconds."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            stat = _stat(path)
            if stat and time.time() - stat.st_mtime >= age:
                shutil.rmtree(path, ignore_errors=True)

    def _not_written(self, error: Exception) -> str:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "no space left on the disk" if full else str(error)
        return (
            f"cannot write to the store {self.folder}: {reason}; "
            "free some space and run the same command again, it resumes from here"
        )


def store_of_environment() -> Store | None:
    """Return the store that the environment names, None where it names none.

    Raises:
        STFError: its size is no number.
    """
    folder, size = os.environ.get(VARIABLE), os.environ.get(VARIABLE_SIZE)
    if not folder:
        return None
    if size is not None and not size.isdecimal():
        raise STFError(f"{VARIABLE_SIZE} is a number of bytes; got {size!r}")
    return Store(Path(folder), int(size) if size else DEFAULT_SIZE)


def _remove(path: Path) -> bool:
    """Remove an entry and say whether that went well."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
