"""Shapes and types of stored tensors, read from the files' headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from safetensors import safe_open

from mergekit_stf.core.errors import STFError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
"""The types of a safetensors file, by the codes in its header; the last from torch 2.7 on."""

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that stand for quantised weights; their values mean little without scales."""


@dataclass(frozen=True)
class Header:
    """Shape and type of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class MakesTensors(Protocol):
    """A loader whose tensors differ from the stored ones."""

    def header(self, name: str) -> Header:
        """Return shape and type of the tensor that the loader would return."""


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
    converted = _convert(load, loader, names)
    if converted is None:
        raise STFError(f"{load.model} has no tensor {load.tensor!r}, which the merge needs")
    return converted


def header_if_any(load: LoadTensor) -> Header | None:
    """Return what `header_of` returns, None where an optional tensor is not there.

    Raises:
        STFError: the model lacks a tensor that is not optional.
    """
    try:
        return header_of(load)
    except STFError:
        if load.optional:
            return None
        raise


def stored_header(loader: LazyTensorLoader, name: str) -> Header:
    """Return the header of the tensor that a checkpoint stores under ``name``.

    A loader that makes tensors of what is stored has a method ``header``, which then answers.
    """
    if isinstance(loader, MakesTensors):
        return loader.header(name)
    path = Path(loader.index.base_path) / loader.index.tensor_paths[name]
    return _headers(path, path.stat().st_mtime_ns)[name]


def stored_types(path: Path) -> dict[str, torch.dtype]:
    """Return the type of every tensor in a file.

    Raises:
        STFError: a type that no tensor of torch has.
    """
    headers = _headers(path, path.stat().st_mtime_ns)
    return {name: header.dtype for name, header in headers.items()}


@lru_cache(maxsize=256)
def _headers(path: Path, modified: int) -> dict[str, Header]:
    if path.suffix != ".safetensors":
        return _pickled_headers(path)
    headers = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            stored = part.get_dtype()
            if stored not in DTYPES:
                raise STFError(
                    f"{path}: {name} is stored as {stored}, as quantised weights are; merge the "
                    "checkpoint from which it was quantised, or dequantise it first"
                )
            headers[name] = Header(tuple(part.get_shape()), DTYPES[stored])
    return headers


def _pickled_headers(path: Path) -> dict[str, Header]:
    tensors = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    return {name: Header(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _convert(load: LoadTensor, loader: LazyTensorLoader, names: list[str]) -> Header | None:
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
