"""The weights in a folder that a merge has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.headers import DTYPES, Header
from mergekit_stf.host.checkpoints.weight_files import ADAPTER, MODEL, weight_files


class Written:
    """Names, shapes and values of the weights in a folder, from the files themselves.

    Args:
        folder: a merged model or a merged adapter.

    Attributes:
        headers: shape and type of every tensor.

    Raises:
        STFError: there is no weight, a file cannot be read, or an index says something else than
            the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [folder / name for name in weight_files(folder, (*MODEL, *ADAPTER))]
        self.headers: dict[str, Header] = {}
        self._places: dict[str, Path] = {}
        for path in self._files:
            headers = _headers(path)
            self._places.update(dict.fromkeys(headers, path))
            self.headers.update(headers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: header.shape for name, header in self.headers.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors, file by file; a tensor is read when its turn comes."""
        for path in self._files:
            yield from _tensors(path)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        path = self._places[name]
        return next(tensor for found, tensor in _tensors(path, [name]) if found == name)


def _headers(path: Path) -> dict[str, Header]:
    if path.suffix != ".safetensors":
        hollow = _pickled(path, "meta")
        return {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in hollow.items()}
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: _header(path, name, part) for name, part in parts.items()}


def _header(path: Path, name: str, part: Any) -> Header:
    if (stored := part.get_dtype()) not in DTYPES:
        raise STFError(f"{path}: {name} is stored as {stored}, a type that torch cannot read")
    return Header(tuple(part.get_shape()), DTYPES[stored])


def _tensors(path: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    if path.suffix != ".safetensors":
        yield from _pickled(path, "cpu").items()
        return
    with safe_open(path, framework="pt") as file:
        for name in names or file.keys():
            yield name, file.get_tensor(name)


def _pickled(path: Path, place: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, map_location=place, mmap=True, weights_only=True)
    return tensors
