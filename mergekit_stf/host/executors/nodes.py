"""What a node must have before a weight is merged there: our versions, and the models' files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.dequantised import DequantisingLoader
from mergekit_stf.host.provenance.lock import versions
from mergekit_stf.host.provenance.machine import instructions, processor
from mergekit_stf.host.run.network import cached_folder
from mergekit_stf.host.store.entry import sources

SETTINGS = "config.json"
HEAD = 2**20
"""Bytes at the beginning of a file without a header that are compared, besides its size."""


@dataclass(frozen=True)
class SeenFile:
    """A file of a model: its name, its size, a digest of its header."""

    name: str
    size: int
    header: str


@dataclass(frozen=True)
class Located:
    """A model as the driver of a merge found it.

    Attributes:
        reference: as the recipe's tasks name it.
        folder: where it lies, absolute; a local model lies there on every node.
        commit: of a hub model, whose folder each node finds in its own cache; None for others.
        quantised: whether its weights are dequantised when they are read.
        files: those that a merge reads.
    """

    reference: ModelReference
    folder: str
    commit: str | None
    quantised: bool
    files: tuple[SeenFile, ...]

    def here(self, cache: str | None) -> Path:
        """Return the folder on this machine, which may be another one than the driver's.

        Args:
            cache: where hub models are kept, if not in the default place.

        Raises:
            STFError: the commit of a hub model is not in the cache.
        """
        if self.commit is None:
            return Path(self.folder)
        return cached_folder(self.reference.model.path, self.commit, cache)


@dataclass(frozen=True)
class Expected:
    """What must be the same on every node: versions, and the models that are merged."""

    versions: tuple[tuple[str, str], ...]
    models: tuple[Located, ...]


def expected_of(models: Sequence[ModelReference]) -> Expected:
    """Return what this process merges with; the host has the models open.

    Args:
        models: all that a recipe names.
    """
    return Expected(tuple(_versions().items()), tuple(map(_located, models)))


def check_node(expected: Expected, node: str, cache: str | None) -> None:
    """Compare this machine with the driver's.

    Args:
        expected: what the driver has.
        node: the name of this machine, for messages.
        cache: where hub models are kept, if not in the default place.

    Raises:
        STFError: with the node, and the version or the file that is missing or another one.
    """
    problem = next(_differences(expected, cache), None)
    if problem:
        raise STFError(f"node {node}: {problem}")


def kind_of_device(device: torch.device) -> str:
    """Return what decides the last bits of a merge: the card, or the processor's name and vectors.

    Args:
        device: on which weights are merged here.
    """
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return " ".join(filter(None, (processor()[0], instructions())))


def _versions() -> dict[str, str]:
    return versions() | {"the source of mergekit-stf": sources()}


def _located(model: ModelReference) -> Located:
    loader = LoaderCache().get(model)
    folder = Path(loader.index.base_path).absolute()
    names = {SETTINGS, *loader.index.tensor_paths.values()}
    hub = model.lora is None and not os.path.isdir(model.model.path)
    return Located(
        reference=model,
        folder=str(folder),
        commit=folder.name if hub else None,
        quantised=isinstance(loader, DequantisingLoader),
        files=tuple(_seen(folder / name) for name in sorted(names)),
    )


def _seen(path: Path) -> SeenFile:
    return SeenFile(path.name, path.stat().st_size, _header(path))


def _header(path: Path) -> str:
    """Return a digest of the header of a safetensors file, or of the beginning of another one."""
    with path.open("rb") as file:
        length = HEAD
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
        return xxhash.xxh3_128_hexdigest(file.read(length))


def _differences(expected: Expected, cache: str | None) -> Iterator[str]:
    here = _versions()
    for name, version in expected.versions:
        if here.get(name) != version:
            yield (
                f"{name} is {here.get(name, 'not installed')} there and {version} where the merge "
                "was started; install the same version on every node"
            )
    for model in expected.models:
        try:
            folder = model.here(cache)
        except STFError as error:
            yield f"commit {model.commit} of {error}"
            continue
        for file in model.files:
            if line := _difference(folder / file.name, file):
                yield f"{folder / file.name} {line}"


def _difference(path: Path, seen: SeenFile) -> str | None:
    """Say how a file differs from the driver's, None where it does not."""
    try:
        here = _seen(path)
    except OSError as error:
        return f"cannot be read ({error.strerror}); every node needs the models at the same path"
    if here.size != seen.size:
        return f"has {here.size} bytes, and {seen.size} where the merge was started"
    if here.header != seen.header:
        return "has another header than where the merge was started; copy it there again"
    return None
