"""Quantised checkpoints made of ordinary ones, and the same numbers as plain float32 weights.

Written from the formats' descriptions with numpy alone, so that what the package reads is compared
with an independent reading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
State = dict[str, Tensor]


def settings(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copies(
    folder: Path,
    pack: Callable[[str, Tensor], tuple[State, Tensor] | None],
    **quantisation: Any,
) -> tuple[Path, Path]:
    """Write a quantised copy of a checkpoint, and one with the numbers that it stands for.

    Args:
        folder: the checkpoint, in float32.
        pack: returns the stored tensors and the numbers of a weight, None to leave it.
        quantisation: what the configuration says.
    """
    packed, plain = folder.with_name(f"{folder.name}-q"), folder.with_name(f"{folder.name}-d")
    stored: State = {}
    numbers: State = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts, values = pack(name, tensor) or ({name: tensor}, tensor)
        stored |= parts
        numbers[name] = values.to(tensor.dtype).contiguous()
    for out, state in ((packed, stored), (plain, numbers)):
        shutil.copytree(folder, out)
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    settings(packed, quantization_config=quantisation)
    return packed, plain


def mxfp4(name: str, tensor: Tensor) -> tuple[State, Tensor] | None:
    """Pack a stack of experts: 32 entries of a row share an exponent, two lie in a byte."""
    if tensor.ndim != 3:
        return None
    rows = tensor.numpy().transpose(0, 2, 1)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6))
    scaled = groups / 2 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - E2M1).argmin(-1)
    blocks = (codes[..., ::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": (exponents + 127).astype(np.uint8)}
    values = (E2M1[codes] * 2 ** exponents[..., None]).reshape(rows.shape).transpose(0, 2, 1)
    return {n: torch.from_numpy(a) for n, a in stored.items()}, torch.from_numpy(values)


def fp8(
    rows: int, columns: int, suffix: str = "_scale_inv"
) -> Callable[[str, Tensor], tuple[State, Tensor] | None]:
    """Return a function that packs matrices in blocks, the last of them smaller if need be."""

    def pack(name: str, tensor: Tensor) -> tuple[State, Tensor] | None:
        if tensor.ndim != 2 or "proj" not in name:
            return None
        height, width = tensor.shape
        scales = np.zeros((-(-height // rows), -(-width // columns)), np.float32)
        stored = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        values = np.zeros(tensor.shape)
        for i, j in np.ndindex(*scales.shape):
            block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = tensor[block].abs().max() / 448
            stored[block] = (tensor[block] / scales[i, j].item()).to(torch.float8_e4m3fn)
            values[block] = stored[block].double().numpy() * float(scales[i, j])
        return {name: stored, name + suffix: torch.from_numpy(scales)}, torch.from_numpy(values)

    return pack
