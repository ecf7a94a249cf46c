"""The files that a merge reads: where they lie, that they can be read, what is in them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.files import inside, sha256_of
from mergekit_stf.host.yaml_text import first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
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
    return [_input_model(*part, options) for part in _parts(config)]


def _parts(config: MergeConfiguration) -> list[tuple[ModelPath, bool]]:
    """Return model paths and whether they are adapters, in an order that is always the same."""
    sources = [config.tokenizer_source, config.tokenizer.source if config.tokenizer else None]
    references = config.referenced_models()
    references += [source for source in sources if isinstance(source, ModelReference)]
    parts = {(r.model, False) for r in references} | {(r.lora, True) for r in references if r.lora}
    return sorted(parts, key=str)


def _input_model(path: ModelPath, adapter: bool, options: MergeOptions) -> InputModel:
    folder = locate(path, options.transformers_cache)
    commit = folder.name if folder.parent.name == "snapshots" else None
    weights = _weights(folder, ADAPTERS if adapter else WEIGHTS)
    for name in weights:
        _check_readable(folder / name)
    others = {p.name for pattern in OTHERS for p in folder.glob(pattern) if p.is_file()}
    return InputModel(str(path), folder, commit, tuple(sorted({*weights, *others})))


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
        index = folder / f"{name}.index.json"
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


class Digests:
    """SHA-256 of every input, computed in the background while the merge runs.

    Args:
        models: the inputs.
    """

    def __init__(self, models: list[InputModel]) -> None:
        self._paths = [model.folder / name for model in models for name in model.files]
        self._before = {path: _identity(path) for path in self._paths}
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._futures: dict[Path, Future[str]] = {}

    def __enter__(self) -> Digests:
        """Start reading."""
        for path in self._paths:
            self._futures[path] = self._pool.submit(sha256_of, path, self._stop.is_set)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop reading, at once when the merge has failed."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[Path, str]:
        """Wait for the digests of all inputs.

        Raises:
            STFError: an input was changed since the merge began.
        """
        digests = {path: future.result() for path, future in self._futures.items()}
        for path, before in self._before.items():
            if _identity(path) != before:
                raise STFError(f"{path} was changed during the merge; run the same command again")
        return digests


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise STFError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
