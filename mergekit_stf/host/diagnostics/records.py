"""What a merge did to each weight, one JSON line a weight, as a by-product of merging."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.record import Record
from mergekit_stf.host.checkpoints.files import read_text

__all__ = [
    "FILE_NAME",
    "VARIABLE",
    "Record",
    "Recorder",
    "Records",
    "from_json",
    "read_records",
    "to_json",
]

FILE_NAME = "stf-diagnostics.jsonl"
VARIABLE = "MERGEKIT_STF_DIAGNOSTICS"

_strict = dataclass(frozen=True, config=ConfigDict(extra="forbid", ser_json_inf_nan="strings"))
_ADAPTER: TypeAdapter[Any] = TypeAdapter(_strict(Record))


class Records(Protocol):
    """What takes records: a ``Recorder``, or what a worker carries."""

    def write(self, record: Record) -> None:
        """Keep what happened to one weight."""


class Recorder:
    """Appends records to one file; safe to call from several threads.

    Args:
        path: the file; what another merge left there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("w", encoding="utf-8")
        except OSError as error:
            raise STFError(f"cannot write diagnostics to {path}: {error.strerror}") from error

    def write(self, record: Record) -> None:
        """Append what happened to one weight."""
        with self._lock:
            self._stream.write(to_json(record) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def to_json(record: Record) -> str:
    """Return a record as one line, without what was not computed."""
    return _ADAPTER.dump_json(record, exclude_defaults=True).decode()


def from_json(text: str) -> Record:
    """Read a record.

    Raises:
        ValueError: the text is none, or contradicts itself.
    """
    found = _ADAPTER.validate_json(text)
    record = Record(**{field.name: getattr(found, field.name) for field in fields(Record)})
    _check(record)
    return record


def read_records(path: Path) -> list[Record]:
    """Read the records of a merge, in the order in which its weights were merged.

    Raises:
        STFError: the file is missing or a line is not a record.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line]


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        record = from_json(line)
        if not (record.name and record.rule and record.models):
            raise ValueError("it names no weight, no rule or no model")
    except ValueError as error:
        raise STFError(
            f"{path}, line {number} is not a record of a merge; "
            "delete the file and merge again to have it written anew"
        ) from error
    return record


def _check(record: Record) -> None:
    """Check that every list with a value for each model is as long as that of the models."""
    tasks = len(record.models) or len(record.norms)
    lists: tuple[Sequence[object], ...] = (
        record.routes, record.kept, record.spectra, record.norms, record.cosine,
    )  # fmt: skip
    if any(len(one) not in (0, tasks) for one in lists) or any(
        len(row) != tasks for row in record.cosine
    ):
        raise ValueError("its lists differ in length from that of its models")
    if record.routes and not (record.norms and record.cosine):
        raise ValueError("it tells of a solve and not of its tasks")
    if len(record.alpha_ratio) not in (0, 5) or any(side < 0 for side in record.shape):
        raise ValueError("its quantiles or its shape are wrong")
