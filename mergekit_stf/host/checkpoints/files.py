"""Files that survive a crash, and digests of what is in them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mergekit_stf.core.errors import STFError

TO_SYNC = os.O_RDWR if os.name == "nt" else os.O_RDONLY
"""How a file is opened to be synced: Windows flushes only what is open for writing."""

CHUNK = 1 << 22
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        STFError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for piece in read_chunks(path):
        digest.update(piece)
    return digest.hexdigest()


def read_chunks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes, a few megabytes at a time, each in the memory of the one before.

    Raises:
        STFError: the file cannot be read.
    """
    buffer = bytearray(CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield memoryview(buffer)[:count]
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error


def check_regular(path: Path) -> None:
    """Refuse what only looks like a file: reading a pipe or a device may never end.

    Raises:
        STFError: there is nothing, or a directory, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise STFError(f"{path}: cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no regular file")
        raise STFError(f"{path} is {kind}; put an ordinary file in its place")


def read_text(path: Path) -> str:
    """Return the text of an ordinary file.

    Raises:
        STFError: there is none, it cannot be read, or it is not UTF-8.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise STFError(f"{path}: cannot be read: not UTF-8 text") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what is written there replaces ``path`` at once.

    The bytes are on the disk before the name changes, so that ``path`` holds the old contents
    or the new ones after a crash at any moment. On an error the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either complete or as it was before."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, their names safely on the disk.

    Raises:
        OSError: it cannot be made, or something else has its name.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path, forget: bool = False) -> None:
    """Force a file's bytes, or a directory's names, to the disk.

    Args:
        path: the file or directory.
        forget: also give back the memory in which the system keeps a copy of the bytes, where the
            system can do that, so that the next file need not be written into fresh memory.

    Raises:
        OSError: a file cannot be synced; of a directory that is no error where the system opens
            none (Windows) or its file system syncs none (some network ones).
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, TO_SYNC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    else:
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def join_inside(root: Path, name: str, links: bool = False) -> Path:
    """Return ``root / name``, for a ``name`` that comes from a file that may be hostile.

    Args:
        root: the folder that must not be left.
        name: a relative path, with ``/`` between its parts.
        links: allow symbolic links out of ``root``, which the hub's cache is made of.

    Raises:
        STFError: the name is absolute, goes up, or leads out of ``root`` through a link.
    """
    relative = PurePosixPath(name)
    if not name.isprintable() or relative.is_absolute() or not _goes_down(relative):
        raise STFError(f"{name!r} is no file name inside {root}; the file that gives it is damaged")
    path = root / relative
    if not links and not path.resolve().is_relative_to(root.resolve()):
        raise STFError(f"{path} leads out of {root} through a link; replace the link by the file")
    return path


def _goes_down(path: PurePosixPath) -> bool:
    bad = any(part == ".." or "\\" in part or ":" in part for part in path.parts)
    return bool(path.parts) and not bad
