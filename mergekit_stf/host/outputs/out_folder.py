"""Whether a merge may put its output at a place, decided before it starts and when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.provenance.lock import FILE_NAME, output_names, read_lock


def out_folder(out: Path) -> Path:
    """Return the folder that an argument OUT means, links followed.

    Raises:
        STFError: it can be no folder of an output.
    """
    if str(out).startswith("~"):
        raise STFError(f"no folder {out}: ~ is not expanded here; write the whole path")
    if out.is_symlink() and not out.exists():
        raise STFError(
            f"{out} is a link to {os.readlink(out)}, which is not there; "
            "make that folder, or remove the link"
        )
    found = out.resolve()
    if not found.name:
        raise STFError(f"{out} cannot be an output folder; name one below it")
    return found


def check_free(out: Path, force: bool, reads: Iterable[Path] = ()) -> None:
    """Check that nothing of the user's is lost when an output takes the place ``out``.

    Args:
        out: as `out_folder` gives it.
        force: an earlier output may be replaced.
        reads: files and folders that the merge reads or keeps.

    Raises:
        STFError: something is there that must stay.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise STFError(f"{out} is a {'link' if out.is_symlink() else 'file'}; name a folder")
    if _is_mount_point(out):
        raise STFError(f"{out} is a mount point and cannot be replaced; name a folder below it")
    for place, what in ((Path.cwd(), "the current folder"), (_home(), "your home folder")):
        if _is_below(place, out):
            raise STFError(f"{out} {_relation(place, out)} {what}; name another folder")
    if not any(out.iterdir()):
        return
    if not force:
        raise STFError(f"{out} is there already; name another folder, or say --force")
    for place in reads:
        if _is_below(place, out) or _is_below(out, place):
            raise STFError(
                f"{out} {_relation(place, out)} {place}, which this merge uses; name another folder"
            )
    check_earlier(out)


def check_earlier(folder: Path) -> None:
    """Check that a folder is an output of an earlier merge and holds nothing else.

    Raises:
        STFError: it has no lock file of ours, or a file that its lock does not name.
    """
    try:
        lock = read_lock(folder)
    except STFError as error:
        raise STFError(
            f"{folder} is not known to be an earlier output, so --force leaves it alone ({error}); "
            "remove it yourself, or name another folder"
        ) from error
    more = sorted(set(output_names(folder)) - {record.name for record in lock.outputs})
    if more:
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        raise STFError(
            f"{folder} holds {more[0]}{others}, which {FILE_NAME} does not name, so --force leaves "
            "it alone; move what you want to keep, or name another folder"
        )


def check_store(store: Path, out: Path) -> None:
    """Check that a store of the user's lies outside an output.

    Raises:
        STFError: it would be published or removed with the output.
    """
    for folder in (out, work_folder(out)):
        if _is_below(store.resolve(), folder):
            raise STFError(f"--store {store} lies in {folder}; name a folder outside of it")


def work_folder(out: Path) -> Path:
    """Return the folder beside ``out`` in which a merge works."""
    return out.with_name(f"{out.name}.stf-work")


def _is_mount_point(folder: Path) -> bool:
    """Whether something is mounted there, another part of the same file system too."""
    mounted = {disk.mountpoint for disk in psutil.disk_partitions(all=True)}
    return os.path.ismount(folder) or str(folder) in mounted


def _home() -> Path:
    return Path(os.path.expanduser("~"))


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies below it, whatever names, links or cases lead there."""
    real, plain = path.resolve(), path.absolute()
    above = dict.fromkeys((real, *real.parents, plain, *plain.parents))
    there = os.path.exists(folder)
    return folder in above or any(
        there and os.path.exists(parent) and parent.samefile(folder) for parent in above
    )


def _relation(place: Path, out: Path) -> str:
    if not _is_below(place, out):
        return "lies in"
    return "is" if _is_below(out, place) else "contains"
