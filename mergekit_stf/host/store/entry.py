"""One entry of the store: a matrix and a note in a file, under a name that its inputs give it."""

from __future__ import annotations

import inspect
import stat
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

import mergekit_stf
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import sync
from mergekit_stf.host.provenance.machine import instructions, processor, switches

PARTIAL = ".partial-"
HEADER = 512
"""More bytes than an entry's header takes."""


def key_of(tensors: Sequence[torch.Tensor], options: Mapping[str, object]) -> str:
    """Return a digest of everything that a merged matrix depends on, in hexadecimal.

    Args:
        tensors: base and tuned tensors as loaded, in the order in which they are merged.
        options: every setting that M depends on, as plain numbers and strings (not λ).
    """
    digest = xxhash.xxh3_128()
    conditions = (_build(), switches(), torch.get_num_threads(), tensors[0].device.type)
    digest.update(repr(conditions).encode())
    digest.update(repr(sorted(options.items())).encode())
    for tensor in tensors:
        _update(digest, tensor)
    return digest.hexdigest()


@cache
def source_of(method: type) -> str:
    """Return a digest of the module that defines a merge method, ours or somebody else's.

    Raises:
        STFError: it was defined in no file, as at a prompt.
    """
    try:
        path = inspect.getsourcefile(method)
    except TypeError:
        path = None
    if path is None:
        raise STFError(
            f"the source of merge method {method.__name__} cannot be found, so that no merged "
            "matrix of it can be stored; define it in a file"
        )
    return xxhash.xxh3_128_hexdigest(Path(path).read_bytes())


def write_entry(path: Path, key: str, matrix: torch.Tensor, note: str) -> None:
    """Write an entry so that ``path`` is complete or absent, whatever happens.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    metadata = {"key": key, "checksum": _checksum(matrix, note), "note": note}
    with TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        save_file({"M": matrix}, temporary, metadata)
        sync(temporary, forget=True)
        temporary.replace(path)
    sync(path.parent)


def read_entry(path: Path, key: str) -> tuple[torch.Tensor, str]:
    """Read matrix and note of the entry at ``path``.

    Raises:
        FileNotFoundError: there is none.
        STFError: it was written for another key, its bytes have changed, or it is no file.
        OSError, SafetensorError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise STFError("it is no file")
    with path.open("rb"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("key") != key:
            raise STFError("it belongs to another weight")
        matrix: torch.Tensor = file.get_tensor("M")
    note = metadata.get("note", "")
    if metadata.get("checksum") != _checksum(matrix, note):
        raise STFError("its checksum is wrong")
    return matrix, note


@cache
def sources() -> str:
    """Return a digest of all our modules that can change a bit of M."""
    digest = xxhash.xxh3_128()
    for layer in ("core", "host"):
        for path in sorted((Path(mergekit_stf.__file__).parent / layer).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _build() -> tuple[str, ...]:
    """Return what can change a bit of M besides its inputs, our own source included."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = (mergekit_stf.__version__, sources(), torch.__version__)
    return (*versions, instructions(), *processor(), device)


def _update(digest: xxhash.xxh3_128, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def _checksum(matrix: torch.Tensor, note: str) -> str:
    digest = xxhash.xxh3_128(note.encode())
    _update(digest, matrix)
    return digest.hexdigest()
