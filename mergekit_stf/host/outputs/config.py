"""The files beside the weights of an output, made to agree with the weights.

The host takes the configuration from the base, and other files only on one of its ways to write
a tokenizer. What then says something else than the weights would be believed by every loader.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mergekit_stf.host.architectures.loading import ParameterNames
from mergekit_stf.host.checkpoints.content import same_bits
from mergekit_stf.host.checkpoints.files import write_text
from mergekit_stf.host.checkpoints.quantised import KEYS
from mergekit_stf.host.outputs.check import names_of
from mergekit_stf.host.outputs.written import Written

LOG = logging.getLogger(__name__)

DESCRIBED = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files whose ``auto_map`` may name classes of the model's own code."""

Settings = dict[str, Any]


def settle_files(base: Path, folder: Path) -> None:
    """Copy what the output lacks from the base's folder, and make its configuration true.

    Args:
        base: the folder of the base model.
        folder: the output, its weights and ``config.json`` written.
    """
    path = folder / "config.json"
    settings: Settings = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(settings)
    _copy_companions(base, folder)
    written = Written(folder)
    _set_dtype(settings, written)
    _drop_quantization(settings)
    names = names_of(folder, len(written.headers))
    if names is not None:
        place = _text_settings(folder, settings)
        _set_vocabulary(place, names, written)
        _untie([settings, place], names, written)
    if settings != before:
        write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _copy_companions(base: Path, folder: Path) -> None:
    """Copy the defaults for generation, and the code that an ``auto_map`` names."""
    files = [base / "generation_config.json"]
    if any(_needs_code(folder / name) for name in DESCRIBED):
        files += base.glob("*.py")
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)


def _needs_code(path: Path) -> bool:
    """Say whether a file names modules beside it; ``repository--module`` lies elsewhere."""
    if not path.is_file():
        return False
    named = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    return any("--" not in str(module) for module in named.values())


def _set_dtype(settings: Settings, written: Written) -> None:
    """Name the type of most weights, in nested configurations too."""
    sizes: Counter[torch.dtype] = Counter()
    for header in written.headers.values():
        if header.dtype.is_floating_point:
            sizes[header.dtype] += math.prod(header.shape)
    if not sizes:
        return
    dtype = str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
    settings.setdefault("dtype", settings.pop("torch_dtype", None))
    for part in _parts(settings):
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})


def _drop_quantization(settings: Settings) -> None:
    """Say nothing of a quantisation: weights are dequantised on read, or the model is refused."""
    for part in _parts(settings):
        for key in KEYS:
            part.pop(key, None)


def _set_vocabulary(place: Settings, names: ParameterNames, written: Written) -> None:
    """Name as many tokens as the embedding has rows, where only that number differs."""
    for name, shape in written.shapes.items():
        if names.parameter(name) == names.embedding is not None:
            wanted = names.shape_of(name)
            if wanted and wanted[0] != shape[0] and wanted[1:] == shape[1:]:
                LOG.warning("vocab_size is %d, as %s has rows", shape[0], name)
                place["vocab_size"] = shape[0]


def _untie(places: list[Settings], names: ParameterNames, written: Written) -> None:
    """Say that head and embedding are not tied where both are written and differ."""
    stored = {names.parameter(name): name for name in written.headers}
    pairs = [(stored.get(one), stored.get(other)) for one, other in names.ties.items()]
    different = [
        (one, other)
        for one, other in pairs
        if one and other and not same_bits(written.tensor(one), written.tensor(other))
    ]
    if not different:
        return
    if places[0].get("scale_decoder_outputs"):  # T5 1.0 reads the flag as another one too
        LOG.warning("%s and %s differ, and transformers 4 would tie them", *different[0])
        return
    LOG.info("%s and %s differ, so tie_word_embeddings is false", *different[0])
    for place in places:
        place["tie_word_embeddings"] = False


def _parts(settings: Settings) -> Iterator[Settings]:
    """Yield a configuration and those nested in it."""
    yield settings
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _parts(value)


def _text_settings(folder: Path, settings: Settings) -> Settings:
    """Return the part of a configuration that describes the language model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = config.get_text_config()
    for key in config.sub_configs:
        if getattr(config, key, None) is text and isinstance(settings.get(key), dict):
            part: Settings = settings[key]
            return part
    return settings
