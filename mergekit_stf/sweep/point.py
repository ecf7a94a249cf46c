"""One point of a sweep, merged unless it is there already as it should be."""

from __future__ import annotations

from pathlib import Path

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.provenance.conditions import Options
from mergekit_stf.host.provenance.digests import Known
from mergekit_stf.host.provenance.lock import FILE_NAME, read_lock
from mergekit_stf.host.provenance.lock_check import find_differences
from mergekit_stf.host.recipe.grid import Point
from mergekit_stf.host.run.merge import StoreOptions, merge_recipe


def merge_point(
    point: Point, folder: Path, options: MergeOptions, store: StoreOptions, known: Known
) -> str:
    """Merge a point unless its folder holds just that, and say which it was.

    Args:
        point: what to merge.
        folder: where.
        options: the host's.
        store: keeps merged matrices for the next points.
        known: digests of the inputs, which all points share.

    Raises:
        STFError: the folder holds something else, or the point cannot be merged.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        merge_recipe(point.recipe, folder, options, store, known=known)
        return "merged"
    if not (folder / FILE_NAME).exists():
        raise STFError(f"{folder} holds no finished point; remove it, or name another OUT")
    lock = read_lock(folder)
    if lock.recipe != point.recipe.text:
        raise STFError(f"{folder} holds a merge of another recipe; remove it, or name another OUT")
    if lock.options != Options.of(options):
        raise STFError(f"{folder} was merged with other options; remove it, or name another OUT")
    for difference in find_differences(lock, folder, options.transformers_cache, known):
        raise STFError(
            f"{folder} is not what it was when it was merged ({difference}); "
            "remove it to merge it again, or name another OUT"
        )
    return "is there already"
