"""``stf.lock.json``: what went into a merge, with what it was made, and what came out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_stf import __version__
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import sha256_of, write_text
from mergekit_stf.host.checkpoints.inputs import InputModel
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.outputs.check import OutputCheck
from mergekit_stf.host.provenance.conditions import Machine, Options, describe_machine

FILE_NAME = "stf.lock.json"
ABOUT = (FILE_NAME, diagnostics.FILE_NAME, "stf-report.html")
FIGURES = re.compile(
    r"stf-report/(interference|spectra|alpha|seconds|memory|timeline|preservation(-\d+)?)\.png"
)
LIBRARIES = ("mergekit", "torch", "transformers", "tokenizers", "safetensors", "numpy")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Model):
    """A file: its name relative to its root, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


class ModelRecord(_Model):
    """An input model: its reference as the recipe writes it, and the files that were read.

    Attributes:
        commit: the commit of a hub model; None for a local folder.
    """

    reference: str
    commit: str | None
    files: tuple[FileRecord, ...]


class Lock(_Model):
    """Everything that decides the bytes of a merge, and the bytes themselves as digests.

    Attributes:
        command: the subcommand of ``mergekit-stf`` and the options that only it has.
        options: the host's options that can change the output.
        sha256: of all else in this file, which tells a later change of it.
        versions: our version and those of the libraries that compute or write.
        device: the name of the accelerator, or ``cpu``.
        threads: torch's number of threads.
        machine: what else is known to change bits; for the reader.
        check: what the check of the output found, None for an adapter.
        workers: the kinds of devices that merged on a cluster, sorted; none for one machine.
    """

    format: Literal[2] = 2
    command: tuple[str, ...] = ("merge",)
    recipe: str
    recipe_sha256: str
    options: Options
    models: tuple[ModelRecord, ...]
    versions: dict[str, str]
    device: str
    threads: Annotated[int, Field(ge=1)]
    machine: Machine
    outputs: tuple[FileRecord, ...]
    check: OutputCheck | None = None
    workers: tuple[str, ...] = ()
    sha256: str = ""

    def digest(self) -> str:
        """Return the SHA-256 of all else in the file."""
        absent = set() if self.workers else {"workers"}  # older locks know nothing of clusters
        return text_digest(self.model_dump_json(exclude={"sha256", *absent}))


def make_lock(
    recipe: str,
    options: MergeOptions,
    models: list[InputModel],
    digests: dict[Path, str],
    folder: Path,
    command: tuple[str, ...] = ("merge",),
    check: OutputCheck | None = None,
    workers: tuple[str, ...] = (),
) -> Lock:
    """Return the lock of a finished merge.

    Args:
        recipe: the recipe's text.
        options: the host's options.
        models: the inputs.
        digests: SHA-256 of each input file.
        folder: the folder of the output.
        command: the subcommand that merged, and the options that only it has.
        check: what the check of the output found.
        workers: the kinds of devices that merged on a cluster.
    """
    lock = Lock(
        command=command,
        recipe=recipe,
        recipe_sha256=text_digest(recipe),
        options=Options.of(options),
        models=tuple(_model_record(model, digests) for model in models),
        versions=versions(),
        device=_device(options.device or "cpu", workers),
        threads=torch.get_num_threads(),
        machine=describe_machine(),
        outputs=tuple(file_record(folder, name) for name in output_names(folder)),
        check=check,
        workers=workers,
    )
    return lock.model_copy(update={"sha256": lock.digest()})


def write_lock(lock: Lock, folder: Path) -> None:
    """Write the lock into the folder of the output."""
    write_text(folder / FILE_NAME, lock.model_dump_json(indent=2) + "\n")


def read_lock(folder: Path) -> Lock:
    """Read the lock of a merge.

    Raises:
        STFError: there is none, or it is no lock.
    """
    path = folder / FILE_NAME
    if path.exists() and not path.is_file():
        raise STFError(f"{path} is no file; merge again")
    try:
        return Lock.model_validate_json(path.read_bytes())
    except OSError as error:
        hint = "; mergekit-stf merge writes one"
        raise STFError(f"{path}: cannot be read: {error.strerror}{hint}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise STFError(f"{path} is damaged: {where}: {first['msg']}; merge again") from error


def output_names(folder: Path) -> list[str]:
    """Return the names of everything in an output that is no folder, sorted.

    A link is one of them, wherever it leads. What tells about the merge and is not made of it is
    left out: the lock, the records of times and memory (``stf-diagnostics.jsonl``), and the files
    of the report drawn from them.
    """
    return sorted(name for name in _entries(folder) if not _is_about(folder / name, name))


def _entries(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        linked = (name for name in folders if os.path.islink(os.path.join(root, name)))
        for name in (*files, *linked):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _is_about(path: Path, name: str) -> bool:
    known = name in ABOUT or FIGURES.fullmatch(name) is not None
    return known and path.is_file() and not path.is_symlink()


def file_record(root: Path, name: str, sha256: str | None = None) -> FileRecord:
    """Return the record of one file, reading it unless its digest is known."""
    path = root / name
    return FileRecord(name=name, size=path.stat().st_size, sha256=sha256 or sha256_of(path))


def versions() -> dict[str, str]:
    """Return the versions that can change the output."""
    return {"mergekit-stf": __version__} | {name: version(name) for name in LIBRARIES}


def device_name(device: str) -> str:
    """Return the name of an accelerator, or the kind of device for all others."""
    kind = torch.device(device).type
    return str(torch.cuda.get_device_name(device)) if kind == "cuda" else kind


def _device(device: str, workers: tuple[str, ...]) -> str:
    """Return the name of the accelerators that merged, which may be those of other machines."""
    on_cards = torch.device(device).type == "cuda"
    return " and ".join(workers) if on_cards and workers else device_name(device)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _model_record(model: InputModel, digests: dict[Path, str]) -> ModelRecord:
    files = (file_record(model.folder, name, digests[model.folder / name]) for name in model.files)
    return ModelRecord(reference=model.reference, commit=model.commit, files=tuple(files))
