"""Which files hold a checkpoint's weights, and that they and their index agree.

transformers loads whatever the files hold, and asks the index only for the names of the files;
mergekit believes the index, and reads a weight from any shard that it has open. A checkpoint is
one and the same model for both only where every weight lies in one file, the one that the index
names.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import check_regular, join_inside, read_text
from mergekit_stf.host.recipe.yaml_text import first_line
from mergekit_stf.text import printable

MODEL = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = ".index.json"
SHOWN = 3
"""Weights that a message names."""


def weight_files(folder: Path, candidates: Iterable[str] = MODEL) -> dict[str, frozenset[str]]:
    """Return the files of weights that a merge reads, and the names of the weights in each.

    Args:
        folder: a model or an adapter.
        candidates: names of a file that holds all weights, the preferred one first; beside the
            name with ``.index.json``, the index of a sharded checkpoint.

    Raises:
        STFError: there are none, one is missing or damaged, or they disagree with their index.
    """
    for name in candidates:
        index = folder / (name + INDEX)
        if index.exists():
            return _read_shards(index, folder / name)
        if (folder / name).exists():
            return {name: stored_names(folder / name)}
    if files := sorted(folder.glob("*.gguf")):
        raise STFError(gguf_problem(files[0]))
    raise STFError(
        f"{folder} holds no weights; expected {' or '.join(candidates)}, "
        f"or shards with their {INDEX.removeprefix('.')}"
    )


def gguf_problem(file: Path) -> str:
    """Say why a GGUF file cannot be merged, with the Python lines that make a checkpoint of it."""
    return (
        f"{file}: its weights are quantised (GGUF); merge the checkpoint from which it was made, "
        "or dequantise it with `pip install gguf` and, in Python, `from transformers import "
        f"AutoModelForCausalLM as M, GgufConfig as Q; M.from_pretrained({str(file.parent)!r}, "
        f"gguf_file={file.name!r}, quantization_config=Q(dequantize=True)).save_pretrained('OUT')`"
    )


def stored_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors in a file.

    Raises:
        STFError: the file is missing, damaged, truncated, or holds anything but tensors.
    """
    check_regular(path)
    stat = path.stat()
    return _names(path, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=4096)
def _names(path: Path, identity: tuple[int, int, int]) -> frozenset[str]:
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return frozenset(file.keys())
        readable = zipfile.is_zipfile(path)
    except (SafetensorError, OSError) as error:
        raise STFError(
            f"{path} is damaged or truncated ({error}); fetch or copy it again"
        ) from error
    if not readable:
        raise STFError(f"{path} is damaged or truncated, or of a type older than torch 1.6")
    return _pickled_names(path)


def _pickled_names(path: Path) -> frozenset[str]:
    """Return the names in a pickle; no tensor is read, and no code of the file's is run."""
    try:
        tensors = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = printable(first_line(error))
        raise STFError(f"{path} cannot be read: {reason}; save it as safetensors") from error
    if not isinstance(tensors, Mapping) or not all(map(torch.is_tensor, tensors.values())):
        raise STFError(f"{path} holds other things than tensors; save the model again")
    return frozenset(map(str, tensors))


def _read_shards(index: Path, single: Path) -> dict[str, frozenset[str]]:
    places = _places(index)
    files = {
        name: join_inside(index.parent, name, links=True) for name in sorted({*places.values()})
    }
    if single.exists() and list(files) != [single.name]:
        raise STFError(
            f"{single.parent} holds both {single.name} and {index.name}, and programs differ in "
            "which of them they read; remove the one that is out of date"
        )
    for path in files.values():
        if not path.exists():
            raise STFError(f"{path} is missing; {index.name} names it")
    names = {name: stored_names(path) for name, path in files.items()}
    problem = next(_disagreements(places, names), None)
    if problem:
        raise STFError(f"{index}: {problem}; fetch the model again, or save it with transformers")
    return names


def _places(index: Path) -> dict[str, str]:
    """Read an index: for each weight the file that holds it."""
    try:
        places = json.loads(read_text(index))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, STFError):
            raise
        raise STFError(f"{index} is damaged: it maps no weights to files") from error
    if not isinstance(places, dict) or not places or not all(map(_is_text, places.values())):
        raise STFError(f"{index} is damaged: it maps no weights to files")
    return places


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _disagreements(places: Mapping[str, str], names: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Yield what the index says of the files that is not so, and what it does not say of them."""
    absent = [name for name, file in places.items() if name not in names[file]]
    if absent:
        yield f"{_list_files(absent)}: not in {places[absent[0]]}, where the index has it"
    for file, held in names.items():
        if unnamed := held - places.keys():
            yield f"{_list_files(unnamed)}: in {file}, and the index does not name it"
        if twice := {name for name in held if places.get(name, file) != file}:
            other = places[min(twice)]
            yield f"{_list_files(twice)}: both in {file} and in {other}, whose values may differ"


def _list_files(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more weights" if len(ordered) > SHOWN else ""
    return printable(", ".join(ordered[:SHOWN])) + more
