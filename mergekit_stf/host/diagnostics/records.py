"""What a merge did to each weight, one JSON line a weight, as a by-product of merging.

The method asks ``active()`` once a weight and, when a recorder listens, hands it the engine's
reports, which hold all that is written; nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.superpose import Report
from mergekit_stf.host.checkpoints.files import read_text
from mergekit_stf.host.diagnostics.numbers import peak_device, peak_rss, summary

FILE_NAME = "stf-diagnostics.jsonl"
VARIABLE = "MERGEKIT_STF_DIAGNOSTICS"


class Record(BaseModel):
    """One weight of a merge. What is None or empty was not computed for it.

    Attributes:
        name: of the weight.
        rule: that merged it.
        shape: of the weight.
        models: the tuned models, sorted; the order of every list below.
        seconds: to merge it, reading and writing left out.
        peak_rss: the process's memory high-water mark after this weight, in bytes.
        peak_device: the most memory allocated on the accelerator until then, in bytes.
        routes: of the decomposition, one a task.
        kept: features that each task brought into the system.
        iterations: applications of G.
        residual: ``‖Gα − s‖ / ‖s‖`` at the end of the solve.
        precision: of the products of the solve, ``bfloat16`` or ``full``.
        converged: whether the solve came below its tolerance.
        condition: lower bound of the condition number of G.
        energy: ``‖M‖² / Σ‖M_i‖²`` of the exact answer; far above 1, tasks contradict each other.
        ridge: added to the diagonal of G.
        cutoff: eigenvalue of G below which contradictions were damped; 0 is the exact answer.
        alpha_ratio: minimum, quartiles and maximum of α/s; 1 is task arithmetic.
        spectra: of each task, singular values at the ranks of ``core.features.spectrum_ranks``.
        norms: ``‖M_i‖``.
        norm_sum: ``‖Σ M_i‖``, the length that task arithmetic would give.
        norm_merged: ``‖M‖``.
        cosine: ``⟨M_i, M_j⟩ / (‖M_i‖ ‖M_j‖)``, the interference of each pair of tasks.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    name: str
    rule: str
    shape: list[int]
    models: list[str]
    seconds: float
    peak_rss: int | None = None
    peak_device: int | None = None
    routes: list[str] = []
    kept: list[int] = []
    iterations: int | None = None
    residual: float | None = None
    precision: str | None = None
    converged: bool | None = None
    condition: float | None = None
    energy: float | None = None
    ridge: float | None = None
    cutoff: float | None = None
    alpha_ratio: list[float] = []
    spectra: list[list[float]] = []
    norms: list[float] = []
    norm_sum: float | None = None
    norm_merged: float | None = None
    cosine: list[list[float]] = []

    @model_validator(mode="after")
    def _agree(self) -> Record:
        """Check that every list with a value for each model is as long as that of the models."""
        lists: tuple[Sequence[object], ...] = (
            self.routes, self.kept, self.spectra, self.norms, self.cosine,
        )  # fmt: skip
        if any(len(one) not in (0, len(self.models)) for one in lists) or any(
            len(row) != len(self.models) for row in self.cosine
        ):
            raise ValueError("its lists differ in length from that of its models")
        if self.routes and not (self.norms and self.cosine):
            raise ValueError("it tells of a solve and not of its tasks")
        if len(self.alpha_ratio) not in (0, 5) or any(side < 0 for side in self.shape):
            raise ValueError("its quantiles or its shape are wrong")
        return self


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

    def record(
        self,
        *,
        name: str,
        rule: str,
        shape: Sequence[int],
        models: Sequence[str],
        seconds: float,
        device: torch.device,
        reports: Sequence[Report] = (),
    ) -> None:
        """Write what happened to one weight.

        Args:
            name: of the weight.
            rule: that merged it.
            shape: of the weight.
            models: one label for each tuned model, in the order of the reports; this differs
                from weight to weight, and records sort it.
            seconds: to merge it, reading and writing left out.
            device: where it was merged.
            reports: the engine's, one for each matrix of an expert stack; none for rules without
                a solve and for matrices that came from the store.
        """
        order = sorted(range(len(models)), key=models.__getitem__)
        record = Record(
            name=name,
            rule=rule,
            shape=list(shape),
            models=[models[task] for task in order],
            seconds=seconds,
            peak_rss=peak_rss(),
            peak_device=peak_device(device),
            **summary(reports, order),
        )
        with self._lock:
            self._stream.write(record.model_dump_json(exclude_defaults=True) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


# A module's state, not a ContextVar: the host merges on several cards from threads that it
# starts itself, and these would not inherit a context.
_current: list[Recorder] = []
_from_environment: dict[str, Recorder] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def recording(path: Path) -> Iterator[Recorder]:
    """Record every weight that is merged inside the block, to ``path``."""
    recorder = Recorder(path)
    _current.append(recorder)
    try:
        yield recorder
    finally:
        _current.remove(recorder)
        recorder.close()


def active() -> Recorder | None:
    """Return the recorder that listens: the block's, or the one the environment names."""
    if _current:
        return _current[-1]
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    with _lock:
        if path not in _from_environment:
            _from_environment[path] = Recorder(Path(path))
        return _from_environment[path]


def read(path: Path) -> list[Record]:
    """Read the records of a merge, in the order in which its weights were merged.

    Raises:
        STFError: the file is missing or a line is not a record.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line]


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        return Record.model_validate_json(line)
    except ValueError as error:
        raise STFError(
            f"{path}, line {number} is not a record of a merge; "
            "delete the file and merge again to have it written anew"
        ) from error
