"""Shapes and types of stored tensors, read from the files' headers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from safetensors import safe_open

from mergekit_stf.core.errors import STFError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Header:
    """Shape and type of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def header_of(load: LoadTensor) -> Header:
    """Return what the host's loading task would load, without reading the tensor.

    Raises:
        STFError: the model has no such tensor.
    """
    loader = LoaderCache().get(load.model)
    names = [load.tensor, *(load.aliases or ()), *(load.tied_names or ())]
    for name in names:
        if name in loader.index.tensor_paths:
            return stored_header(loader, name)
    converted = _converted(load, loader, names)
    if converted is None:
        raise STFError(f"{load.model} has no tensor {load.tensor!r}, which the merge needs")
    return converted


def stored_header(loader: LazyTensorLoader, name: str) -> Header:
    """Return the header of the tensor that a checkpoint stores under ``name``."""
    path = Path(loader.index.base_path) / loader.index.tensor_paths[name]
    return _headers(path, path.stat().st_mtime_ns)[name]


@lru_cache(maxsize=256)
def _headers(path: Path, modified: int) -> dict[str, Header]:
    if path.suffix != ".safetensors":
        return _pickled_headers(path)
    headers = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            stored = part.get_dtype()
            if stored not in _DTYPES:
                raise STFError(f"{path}: {name} is stored as {stored}, which cannot be merged")
            headers[name] = Header(tuple(part.get_shape()), _DTYPES[stored])
    return headers


def _pickled_headers(path: Path) -> dict[str, Header]:
    tensors = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    return {name: Header(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _converted(load: LoadTensor, loader: LazyTensorLoader, names: list[str]) -> Header | None:
    """Let the host fuse tensors that have shapes and no storage."""
    sources: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(_hollow, loader, name) for name in loader.index.tensor_paths
    }
    model_type = load.model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
    for name in names:
        fused = convert_checkpoint_tensors(model_type, sources, name)
        if fused is not None:
            return Header(tuple(fused.shape), fused.dtype)
    return None


def _hollow(loader: LazyTensorLoader, name: str) -> torch.Tensor:
    header = stored_header(loader, name)
    return torch.empty(header.shape, dtype=header.dtype, device="meta")
