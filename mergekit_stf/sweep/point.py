"""One point of a sweep, merged unless it is there already as it should be."""

from __future__ import annotations

from pathlib import Path

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.executors.execution import Executor
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.provenance.conditions import Options
from mergekit_stf.host.provenance.digests import Known
from mergekit_stf.host.provenance.lock import FILE_NAME, read_lock
from mergekit_stf.host.provenance.lock_check import find_differences
from mergekit_stf.host.recipe.grid import Point
from mergekit_stf.host.run.merge import StoreOptions, merge_recipe


def merge_point(
    point: Point,
    folder: Path,
    options: MergeOptions,
    store: StoreOptions,
    known: Known,
    force: bool = False,
    executor: Executor | None = None,
) -> str:
    """Merge a point unless its folder holds just that, and say which it was.

    Args:
        point: what to merge.
        folder: where.
        options: the host's.
        store: keeps merged matrices for the next points.
        known: digests of the inputs, which all points share.
        force: merge again what is not as it should be.
        executor: runs the weights; this process where none is given.

    Raises:
        STFError: the folder holds something else, or the point cannot be merged.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        merge_recipe(point.recipe, folder, options, store, known=known, executor=executor)
        return "merged"
    if not (folder / FILE_NAME).exists():
        raise STFError(f"{folder} holds no finished point; remove it, or name another OUT")
    change = _change(point, folder, options, known)
    if not change:
        return "is there already"
    if not force:
        raise STFError(
            f"{folder} {change}; remove it to merge it again, name another OUT, or give --force"
        )
    merge_recipe(point.recipe, folder, options, store, force=True, known=known, executor=executor)
    return "merged again"


def _change(point: Point, folder: Path, options: MergeOptions, known: Known) -> str:
    """Say in what a finished merge is not the point; nothing where it is."""
    lock = read_lock(folder)
    if lock.recipe != point.recipe.text:
        return "holds a merge of another recipe"
    if lock.options != Options.of(options):
        return "was merged with other options"
    for difference in find_differences(lock, folder, options.transformers_cache, known):
        return f"is not what it was when it was merged ({difference})"
    return ""
