"""What is no longer as a lock file says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelPath

from mergekit_stf.host.checkpoints.files import join_inside
from mergekit_stf.host.outputs.check import OutputCheck, structure_faults, value_faults
from mergekit_stf.host.provenance.digests import Known, digest_of
from mergekit_stf.host.provenance.lock import (
    FILE_NAME,
    FileRecord,
    Lock,
    ModelRecord,
    output_names,
    text_digest,
    versions,
)
from mergekit_stf.host.recipe.yaml_text import first_line
from mergekit_stf.host.run.network import cached_folder
from mergekit_stf.text import printable


def find_differences(
    lock: Lock, folder: Path, cache: str | None = None, known: Known | None = None
) -> Iterator[str]:
    """Yield one line for each thing that is no longer as the lock says.

    Args:
        lock: the lock.
        folder: the folder of the output.
        cache: where hub models are kept, if not in the default place.
        known: digests that the caller keeps, so that inputs are read once for several locks.
    """
    known = {} if known is None else known
    if text_digest(lock.recipe) != lock.recipe_sha256:
        yield f"{FILE_NAME}: the recipe in it was changed"
    elif lock.digest() != lock.sha256:
        yield f"{FILE_NAME}: it was changed after the merge"
    here = versions()
    for name in lock.versions | here:
        was, now = lock.versions.get(name, "none"), here.get(name, "not installed")
        if now != was:
            yield f"version of {name}: merged with {was}, here is {now}"
    for model in lock.models:
        yield from _model_differences(model, cache, known)
    changed = list(_file_differences(lock.outputs, folder, known))
    yield from (f"output {line}" for line in changed)
    for name in sorted(set(output_names(folder)) - {record.name for record in lock.outputs}):
        yield f"output {name}: not in the lock"
    if not changed:
        yield from (f"output {line}" for line in _weight_faults(lock.check, folder))


def _weight_faults(check: OutputCheck | None, folder: Path) -> Iterator[str]:
    """Yield what an output tells alone against the check that it passed, if it passed one."""
    yield from value_faults(folder, check.infinite if check else ())
    if check is not None:
        yield from structure_faults(folder, check.unfilled)


def _model_differences(model: ModelRecord, cache: str | None, known: Known) -> Iterator[str]:
    try:
        folder = _present(model, cache)
    except (OSError, ValueError, RuntimeError) as error:
        yield f"input {model.reference}: not on this machine ({printable(first_line(error))})"
        return
    for line in _file_differences(model.files, folder, known, links=True):
        yield f"input {model.reference}: {line}"


def _present(model: ModelRecord, cache: str | None) -> Path:
    """Return a model's folder without asking the network: a lock file must not start downloads."""
    path = ModelPath.model_validate(model.reference)
    if model.commit is None:
        return Path(path.path).resolve(strict=True)
    return cached_folder(path.path, model.commit, cache)


def _file_differences(
    records: tuple[FileRecord, ...], root: Path, known: Known, links: bool = False
) -> Iterator[str]:
    for record in records:
        path = join_inside(root, record.name, links=links)
        if not path.is_file():
            yield f"{record.name}: missing"
        elif path.stat().st_size != record.size:
            yield f"{record.name}: {path.stat().st_size} bytes, was {record.size}"
        elif digest_of(path, known) != record.sha256:
            yield f"{record.name}: other bytes"
