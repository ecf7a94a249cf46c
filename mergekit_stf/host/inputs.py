"""The files that a merge reads: where they lie, and that they can be read."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import inside
from mergekit_stf.host.yaml_text import first_line, shown
from mergekit_stf.text import printable

WEIGHTS = {
    "model": ("model.safetensors", "pytorch_model.bin"),
    "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}
SETTINGS = {
    "model": ("config.json", "model_type"),
    "adapter": ("adapter_config.json", "peft_type"),
}
INDEX = ".index.json"
OTHERS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")


@dataclass(frozen=True)
class InputModel:
    """One model or adapter of a recipe.

    Attributes:
        reference: as the recipe writes it, ``path`` or ``path@revision``.
        folder: where its files lie on this machine.
        commit: the commit of a hub model, None for a local one.
        files: the names of the files that a merge may read, sorted.
    """

    reference: str
    folder: Path
    commit: str | None
    files: tuple[str, ...]


def input_models(config: MergeConfiguration, options: MergeOptions) -> list[InputModel]:
    """Locate the models of a recipe, fetch hub models as the host does, and list their files.

    Raises:
        STFError: a model cannot be found, or one of its files is missing, damaged or truncated.
    """
    overridden = {r.model for r in config.referenced_models() if r.override_architecture}
    models = []
    for path, kind in _parts(config).items():
        model = _input_model(path, kind, options)
        if kind != "tokenizer":
            _check_settings(model.folder, kind, path in overridden)
        models.append(model)
    return sorted(models, key=lambda model: model.reference)


def _parts(config: MergeConfiguration) -> dict[ModelPath, str]:
    """Return every folder that the host reads, and what it takes from there."""
    sources = [config.tokenizer_source, config.tokenizer.source if config.tokenizer else None]
    parts = {s.model: "tokenizer" for s in sources if isinstance(s, ModelReference)}
    references = config.referenced_models()
    parts |= {r.lora: "adapter" for r in references if r.lora}
    return parts | {r.model: "model" for r in references}


def _input_model(path: ModelPath, kind: str, options: MergeOptions) -> InputModel:
    folder = locate(path, options.transformers_cache)
    commit = folder.name if folder.parent.name == "snapshots" else None
    weights = [] if kind == "tokenizer" else _weights(folder, WEIGHTS[kind])
    for name in weights:
        if not name.endswith(INDEX):
            _check_readable(folder / name)
    others = {p.name for pattern in OTHERS for p in folder.glob(pattern) if p.is_file()}
    return InputModel(str(path), folder, commit, tuple(sorted({*weights, *others})))


def _check_settings(folder: Path, kind: str, overridden: bool) -> None:
    """Check of a configuration what the host takes for granted."""
    name, key = SETTINGS[kind]
    path = folder / name
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise STFError(f"{path}: cannot be read: {printable(first_line(error))}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get(key), str):
        raise STFError(f"{path}: expected a mapping with {key!r}; fetch or copy it again")
    if kind == "adapter" or overridden:
        return
    match settings.get("architectures"):
        case [str()]:
            return
        case other:
            raise STFError(
                f"{path}: 'architectures' should name one class; got {shown(other)}; "
                "save the model again with transformers"
            )


def locate(path: ModelPath, cache: str | None) -> Path:
    """Return the folder of a model; a hub model is fetched unless it is in the cache."""
    if os.path.isdir(path.path):
        return Path(path.path)
    try:
        return Path(ModelReference(model=path).local_path(cache_dir=cache))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise STFError(
            f"{path}: no such folder, and not to be had from the hub: {reason}"
        ) from error


def _weights(folder: Path, candidates: tuple[str, ...]) -> list[str]:
    for name in candidates:
        index = folder / (name + INDEX)
        if index.exists():
            return [*_shards(index), index.name]
        if (folder / name).exists():
            return [name]
    raise STFError(f"{folder} holds no weights; expected {' or '.join(candidates)}")


def _shards(index: Path) -> Iterator[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            inside(index.parent, name, links=True)
            yield name
    except STFError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise STFError(f"{index} is damaged: it maps no weights to files") from error


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise STFError(f"{path} is missing; its model's index names it")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        readable = zipfile.is_zipfile(path)
    except (SafetensorError, OSError) as error:
        raise STFError(
            f"{path} is damaged or truncated ({error}); fetch or copy it again"
        ) from error
    if not readable:
        raise STFError(f"{path} is damaged or truncated, or of a type older than torch 1.6")
