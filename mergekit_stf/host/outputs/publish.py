"""A finished folder put where it belongs, and nothing lost on the way."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

RENAME_EXCHANGE = 2
AT_FDCWD = -100
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP})
"""What a file system, a kernel or a container's filter answers when it knows no exchange."""


def put_in_place(new: Path, out: Path, aside: Path, replace: bool) -> Path | None:
    """Put the folder ``new`` at ``out``, in one step where the system has one.

    Where it has none and ``out`` holds something, that is moved to ``aside`` first, and back when
    ``new`` cannot follow. Only an empty folder at ``out`` is ever replaced: POSIX renames a folder
    over nothing else.

    Args:
        new: the finished folder.
        out: where it belongs, on the same file system.
        aside: a name there that is free.
        replace: what is at ``out`` makes way; otherwise an empty folder alone does.

    Returns:
        Where the folder lies that was at ``out``; None if there was none, or an empty one.

    Raises:
        OSError: ``new`` could not take its place; it lies where it was, and so does what was at
            ``out``.
    """
    if not replace or is_free(out):
        if os.name == "nt":  # where a folder replaces none, an empty one neither
            with suppress(FileNotFoundError):
                out.rmdir()
        new.rename(out)
        return None
    if exchange(new, out):
        return new
    out.rename(aside)
    try:
        new.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    return aside


def put_beside(folder: Path, out: Path, what: str) -> Path:
    """Move a folder to the first free name ``OUT.what``, ``OUT.what-2``, … and return its path.

    Raises:
        OSError: it cannot be moved.
    """
    names = (f"{out.name}.{what}{'' if n == 1 else f'-{n}'}" for n in count(1))
    place = next(path for path in map(out.with_name, names) if not os.path.lexists(path))
    folder.rename(place)
    return place


def is_free(out: Path) -> bool:
    """Whether nothing is at ``out``, or an empty folder."""
    return not os.path.lexists(out) or (
        out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    )


def exchange(first: Path, second: Path) -> bool:
    """Exchange what two names stand for, in one step.

    Returns:
        Whether that was done; False where the C library, the kernel or the file system cannot.

    Raises:
        OSError: the names cannot be exchanged for another reason.
    """
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _renameat2() -> Callable[..., int] | None:
    if os.name != "posix":
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return found
