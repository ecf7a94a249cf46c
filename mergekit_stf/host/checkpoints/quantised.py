"""Checkpoints that hold quantised weights: found before any work, by what they store and say.

A quantised weight lies in several tensors under names of its format, or in one of a type of one
byte that means nothing without its scales. A merge that passes over them loses the weight. Two
formats are dequantised on read (``dequantised.py``); for the others there is a refusal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.headers import EIGHT_BIT_FLOATS, stored_types
from mergekit_stf.host.checkpoints.inputs import locate
from mergekit_stf.host.checkpoints.weight_files import weight_files
from mergekit_stf.host.recipe.yaml_text import short_repr

SIGNS: Mapping[str, str] = {
    "mxfp4": r"_blocks$",
    "bitsandbytes nf4": r"\.quant_state\.bitsandbytes__nf4$",
    "bitsandbytes fp4": r"\.quant_state\.bitsandbytes__fp4$",
    "bitsandbytes": r"\.(absmax|quant_map|SCB)$",
    "GPTQ": r"\.g_idx$",
    "GPTQ or AWQ": r"\.qweight$",
    "compressed-tensors": r"\.weight_packed$",
    "NVFP4": r"\.weight_scale_2$",
    "HQQ": r"\.W_q$",
    "quanto": r"\._data$",
    "AQLM": r"\.codebooks$",
    "VPTQ": r"\.centroids(\.weight)?$",
    "fp8": r"_scale_inv$",
}
"""Names that only quantised weights have, the most telling first."""

METHODS: Mapping[str, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "gguf": "GGUF",
}
"""How people write what ``quant_method`` says."""

READABLE = ("mxfp4", "fp8")
"""Formats that are dequantised on read."""

KEYS = ("quantization_config", "compression_config")
"""What the configuration of a quantised checkpoint has, and a merged one must not have."""

REMEDY = (
    "merge the checkpoints from which they were quantised; where there are none, dequantise each "
    "with the library of its format and save it in bfloat16"
)

UNSEEN = "no tensor shows it; if they are not, take `quantization_config` out of its config.json"


@dataclass(frozen=True)
class Quantised:
    """How a checkpoint is quantised.

    Attributes:
        kind: the format, as people write it.
        pairs: the quantised tensors that can be read, with the names of their scales, by the
            name of the weight; empty where the format is not one of :data:`READABLE`.
    """

    kind: str
    pairs: Mapping[str, tuple[str, str]]


def find_quantisation(model: ModelReference, options: MergeOptions) -> Quantised | None:
    """Say whether and how a model is quantised, from its file names, headers and configuration.

    Args:
        model: a model without an adapter.
        options: the host's options.

    Raises:
        STFError: the model is a GGUF file, or a weight of one byte has no scales.
    """
    folder = locate(model.model, options.transformers_cache)
    types: dict[str, torch.dtype] = {}
    for name in weight_files(folder):
        types |= stored_types(folder / name)
    kind = _by_content(types) or (None if _are_plain(types) else _by_settings(folder))
    if kind is None:
        return None
    if kind not in READABLE:
        return Quantised(kind, {})
    return Quantised(kind, _pairs(folder, kind, types))


def quantised_error(model: ModelReference, found: Quantised, remedy: str = REMEDY) -> STFError:
    """Return the error that names a model, its format and the way out."""
    return STFError(f"{model}: its weights are quantised ({found.kind}); {remedy}")


def _by_content(types: Mapping[str, torch.dtype]) -> str | None:
    for kind, pattern in SIGNS.items():
        if any(map(re.compile(pattern).search, types)):
            return kind
    if any(dtype in EIGHT_BIT_FLOATS for dtype in types.values()):
        return "fp8"
    whole = (torch.int8, torch.uint8)
    integers = any(dtype in whole and name.endswith(".weight") for name, dtype in types.items())
    return "8-bit integers" if integers else None


def _are_plain(types: Mapping[str, torch.dtype]) -> bool:
    """Say whether all tensors are ordinary numbers, whatever a configuration still says."""
    return all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in types.values())


def _by_settings(folder: Path) -> str | None:
    """Return the format that a configuration names; the names of the tensors tell of none."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (settings, settings.get("text_config")):
        found = [part[key] for key in KEYS if isinstance(part, dict) and part.get(key)]
        if found:
            method = found[0].get("quant_method") if isinstance(found[0], dict) else None
            return METHODS.get(str(method), str(method or short_repr(found[0])))
    return None


def _pairs(folder: Path, kind: str, types: Mapping[str, torch.dtype]) -> dict[str, tuple[str, str]]:
    """Find each quantised tensor's scales."""
    if kind == "mxfp4":
        stems = [name.removesuffix("_blocks") for name in types if name.endswith("_blocks")]
        pairs = {stem: (f"{stem}_blocks", f"{stem}_scales") for stem in stems}
    else:
        narrow = [name for name, dtype in types.items() if dtype in EIGHT_BIT_FLOATS]
        pairs = {name: (name, _scales(name, types)) for name in narrow}
    alone = sorted(name for name, (_, scales) in pairs.items() if scales not in types)
    if alone or not pairs:
        problem = f"{alone[0]} has no scales beside it; {REMEDY}" if alone else UNSEEN
        raise STFError(f"{folder}: its weights are quantised ({kind}), but {problem}")
    return pairs


def _scales(name: str, types: Iterable[str]) -> str:
    found = (name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in types)
    return next(found, "")
