"""Quantised weights as the numbers that they stand for, made while the checkpoint is read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.headers import Header, stored_header
from mergekit_stf.host.checkpoints.quantised import Quantised
from mergekit_stf.host.compat import convert_moe_packed_tensors

ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_(global_)?scale(_inv|_ub)?$")
"""Scales of activations and of the cache, which no dequantised model has a use for."""

BLOCK = (128, 128)
"""Rows and columns that share a scale in fp8 where the configuration does not say."""


class DequantisingLoader(LazyTensorLoader):
    """A checkpoint in mxfp4 or in fp8 as if it held ordinary weights.

    Its index names the weights and not the tensors of which they are made.

    Args:
        stored: the checkpoint as it is.
        found: how it is quantised.
    """

    def __init__(self, stored: LazyTensorLoader, found: Quantised) -> None:
        self._stored, self._found = stored, found
        settings = _settings(Path(stored.index.base_path))
        self._block = _block(settings)
        self._dtype = _dtype(settings)
        super().__init__(dataclasses.replace(stored.index), stored.lazy_unpickle)
        parts = {part for pair in found.pairs.values() for part in pair}
        paths = stored.index.tensor_paths
        plain = {n: p for n, p in paths.items() if n not in parts and not ACTIVATIONS.search(n)}
        self.index.tensor_paths = plain | {n: paths[pair[0]] for n, pair in found.pairs.items()}

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return a tensor as the host's loader does, a quantised weight dequantised."""
        names = [name for name in (key, *(aliases or ())) if name in self._found.pairs]
        if not names:
            found: Tensor | None = self._stored.get_tensor(key, device, aliases, raise_on_missing)
            return found
        values, scales = map(self._stored.get_tensor, self._found.pairs[names[0]])
        return self._dequantise(names[0], values, scales).to(device)

    def header(self, name: str) -> Header:
        """Return shape and type of a tensor as `get_tensor` returns it."""
        if name not in self._found.pairs:
            return stored_header(self._stored, name)
        shape = stored_header(self._stored, self._found.pairs[name][0]).shape
        if self._found.kind == "mxfp4":
            *stack, rows, groups, half = shape
            shape = (*stack, groups * half * 2, rows)
        return Header(shape, self._dtype)

    def flush(self) -> None:
        """Close the file that is open."""
        self._stored.flush()

    def _dequantise(self, name: str, values: Tensor, scales: Tensor) -> Tensor:
        if self._found.kind == "mxfp4":
            made: Tensor = convert_moe_packed_tensors(values, scales, dtype=self._dtype)
            return made
        try:
            return apply_scales(values, scales, self._block).to(self._dtype)
        except ValueError as error:
            raise STFError(f"{self.index.base_path}: {name}: {error}") from error


def apply_scales(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return fp8 values times the scale of their block, row or tensor, in float32.

    Args:
        values: a matrix, or a stack of them.
        scales: one number; one a row; or one a block, the last block of a row or column possibly
            smaller. Whole numbers of eight bits are exponents of two, with an offset of 127.
        block: rows and columns of a block.

    Raises:
        ValueError: the scales fit neither.
    """
    factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    if factors.numel() == 1 or values.ndim < 2:
        return values.float() * factors.reshape(factors.shape if factors.numel() > 1 else ())
    if factors.ndim == values.ndim - 1:
        factors = factors.unsqueeze(-1)
    for axis, side in zip((-2, -1), block, strict=True):
        length, count = values.shape[axis], factors.shape[axis]
        if math.ceil(length / side) != count:
            side, rest = divmod(length, count)
            if rest:
                raise ValueError(
                    f"scales of shape {tuple(scales.shape)} fit no weight of shape "
                    f"{tuple(values.shape)}; fetch or copy the checkpoint again"
                )
        factors = factors.repeat_interleave(side, axis).narrow(axis, 0, length)
    return values.float() * factors


def _settings(folder: Path) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the block that the configuration names."""
    match (settings.get("quantization_config") or {}).get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            return BLOCK


def _dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Return the type that transformers would load: bfloat16 unless float32 is asked for."""
    asked = settings.get("dtype") or settings.get("torch_dtype")
    return torch.float32 if asked == "float32" else torch.bfloat16
