"""Safetensors files written piece by piece, from headers that are known before any value is.

The host's writer keeps a shard in memory until it is full. Here a few rows are in memory at a
time, and the disk takes what is written while the next rows are computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.content import content_of
from mergekit_stf.host.checkpoints.headers import DTYPES, Header

CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
SYNCED = 2**24
"""Bytes after which the disk is asked to take what has been written."""


def write_shards(
    headers: dict[str, Header],
    pieces: Callable[[str], Iterable[Tensor]],
    out: Path,
    limit: int,
) -> None:
    """Write tensors into as many files as their sizes ask for, named as transformers names them.

    Args:
        headers: shape and type of every tensor, in the order in which shards are filled.
        pieces: yields the entries of a tensor in order, in one or more tensors of its type, each
            of which is written before the next one is asked for.
        out: an existing directory, without weights.
        limit: bytes of tensors in a file; a larger tensor gets a file for itself.

    Raises:
        STFError: a type that safetensors cannot hold.
    """
    shards = _fill_shards(headers, limit)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in _numbers(shards)]
    for file, shard in zip(files, shards, strict=True):
        _write(out / file, shard, pieces)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(_size(header) for header in headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _numbers(shards: list[dict[str, Header]]) -> range:
    return range(1, len(shards) + 1)


def _fill_shards(headers: dict[str, Header], limit: int) -> list[dict[str, Header]]:
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for name, header in headers.items():
        if shards[-1] and filled + _size(header) > limit > 0:
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += _size(header)
    return shards


def _write(path: Path, shard: dict[str, Header], pieces: Callable[[str], Iterable[Tensor]]) -> None:
    # Wide types first, as safetensors does: every tensor is then aligned for its type.
    ordered = dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))
    with SyncedFile(path) as file:
        file.write(memoryview(_preamble(ordered)))
        for name in ordered:
            for piece in pieces(name):
                file.write(content_of(piece).numpy().data)


def _preamble(shard: dict[str, Header]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (start, end) in zip(shard, _spans(shard.values()), strict=True):
        header = shard[name]
        if header.dtype not in CODES:
            raise STFError(f"{name}: {header.dtype} cannot be stored as safetensors")
        entries[name] = {
            "dtype": CODES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _spans(headers: Iterable[Header]) -> Iterator[tuple[int, int]]:
    end = 0
    for header in headers:
        start, end = end, end + _size(header)
        yield start, end


def _size(header: Header) -> int:
    return torch.Size(header.shape).numel() * header.dtype.itemsize


class SyncedFile:
    """A new file that is on the disk when it is closed, most of it while it is being written.

    Args:
        path: where to write.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._sync: Future[None] | None = None
        self._waiting = 0

    def __enter__(self) -> SyncedFile:
        """Return the file itself."""
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: these or earlier bytes cannot be written.
        """
        self._file.write(data)
        self._waiting += data.nbytes
        if self._waiting >= SYNCED and (self._sync is None or self._sync.done()):
            self._wait()
            self._sync = self._pool.submit(os.fsync, self._file.fileno())
            self._waiting = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; unless an error is under way, its last bytes are on the disk then."""
        try:
            if error is None:
                self._wait()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._pool.shutdown()
            self._file.close()

    def _wait(self) -> None:
        if self._sync is not None:
            self._sync.result()
