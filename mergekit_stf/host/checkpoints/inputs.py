"""The files that a merge reads: where they lie, and that they can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.counts import check_counts
from mergekit_stf.host.checkpoints.files import check_regular, read_text
from mergekit_stf.host.checkpoints.weight_files import ADAPTER, MODEL, gguf_problem, weight_files
from mergekit_stf.host.recipe.recipe import Recipe
from mergekit_stf.host.recipe.yaml_text import first_line, short_repr
from mergekit_stf.text import printable

WEIGHTS: Mapping[str, tuple[str, str]] = {"model": MODEL, "adapter": ADAPTER}
SETTINGS: Mapping[str, tuple[str, str]] = {
    "model": ("config.json", "model_type"),
    "adapter": ("adapter_config.json", "peft_type"),
}
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
    for path, kind in _input_folders(config).items():
        folder = locate(path, options.transformers_cache)
        _check_entries(folder)
        held = {} if kind == "tokenizer" else weight_files(folder, WEIGHTS[kind])
        if kind != "tokenizer":
            names = {name for stored in held.values() for name in stored}
            _check_settings(folder, kind, path in overridden, len(names))
        models.append(_input_model(path, folder, list(held)))
    return sorted(models, key=lambda model: model.reference)


def input_places(recipe: Recipe, options: MergeOptions) -> list[Path]:
    """Return every place that a merge reads, without asking the network.

    These are the recipe's file, the local models and what links in them point to, and the folder
    in which hub models are kept.
    """
    folders = [
        Path(path.path) for path in _input_folders(recipe.config) if os.path.isdir(path.path)
    ]
    links = [path for folder in folders for path in folder.iterdir() if path.is_symlink()]
    hub = [Path(options.transformers_cache or HF_HUB_CACHE)]
    own = [recipe.path] if recipe.path else []
    return [*own, *folders, *links, *hub * (len(folders) < len(_input_folders(recipe.config)))]


def _input_folders(config: MergeConfiguration) -> dict[ModelPath, str]:
    """Return every folder that the host reads, and what it takes from there."""
    sources = [config.tokenizer_source, config.tokenizer.source if config.tokenizer else None]
    parts = {s.model: "tokenizer" for s in sources if isinstance(s, ModelReference)}
    references = config.referenced_models()
    parts |= {r.lora: "adapter" for r in references if r.lora}
    return parts | {r.model: "model" for r in references}


def _input_model(path: ModelPath, folder: Path, weights: list[str]) -> InputModel:
    hub = not os.path.isdir(path.path)
    found = (p for pattern in OTHERS for p in folder.glob(pattern) if p.is_file())
    others = {p.name for p in found if p.name.isprintable()}  # no loader asks for another name
    commit = folder.name if hub else None
    return InputModel(str(path), folder, commit, tuple(sorted({*weights, *others})))


def _check_entries(folder: Path) -> None:
    """Refuse pipes, sockets and devices: the host and transformers open what they find."""
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_dir():
            check_regular(entry)


def _check_settings(folder: Path, kind: str, overridden: bool, weights: int) -> None:
    """Check of a configuration what the host takes for granted."""
    name, key = SETTINGS[kind]
    path = folder / name
    text = read_text(path)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise STFError(f"{path}: cannot be read: {printable(first_line(error))}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get(key), str):
        raise STFError(f"{path}: expected a mapping with {key!r}; fetch or copy it again")
    if kind == "adapter":
        return
    check_counts(settings, path, weights)
    if overridden:
        return
    match settings.get("architectures"):
        case [str()]:
            return
        case other:
            raise STFError(
                f"{path}: 'architectures' should name one class; got {short_repr(other)}; "
                "save the model again with transformers"
            )


def locate(path: ModelPath, cache: str | None) -> Path:
    """Return the folder of a model; a hub model is fetched unless it is in the cache."""
    if os.path.isdir(path.path):
        return Path(path.path)
    if path.path.endswith(".gguf") and os.path.isfile(path.path):
        raise STFError(gguf_problem(Path(path.path)))
    try:
        return Path(ModelReference(model=path).local_path(cache_dir=cache))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise STFError(
            f"{path}: no such folder, and not to be had from the hub: {reason}"
        ) from error
