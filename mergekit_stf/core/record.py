"""What was done to one weight, in numbers: one line of a merge's diagnostics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One weight of a merge. What is None or empty was not computed for it.

    A method fills what it knows of its matrix; whoever runs the merge adds the weight's name, its
    models and the time.

    Attributes:
        name: of the weight.
        method: that merged it.
        rule: that merged it.
        shape: of the weight.
        models: the tuned models, sorted; the order of every list below.
        seconds: to merge it, reading and writing left out.
        peak_rss: the process's memory high-water mark after this weight, in bytes.
        peak_device: the most memory allocated on the accelerator until then, in bytes.
        routes: of the decomposition, one a task.
        kept: features that each task brought in.
        iterations: applications of G.
        residual: ``|G alpha - s| / |s|`` at the end of the solve.
        converged: whether the solve came below its tolerance.
        condition: lower bound of the condition number of the system that was solved.
        energy: ``|M|² / Σ|M_i|²`` of the exact answer; far above 1, tasks contradict each other.
        ridge: added to the diagonal of the system, relative to it.
        cutoff: eigenvalue of G below which contradictions were damped; 0 is the exact answer.
        alpha_ratio: minimum, quartiles and maximum of α/s; 1 is task arithmetic.
        spectra: of each task, singular values at the ranks of ``features.spectrum_ranks``.
        norms: ``|M_i|`` of what was merged, trimmed and truncated.
        norm_sum: ``|Σ M_i|``, the length that task arithmetic would give.
        norm_merged: ``|M|``.
        cosine: ``⟨M_i, M_j⟩ / (|M_i| |M_j|)``, the interference of each pair of tasks; 0 for a
            task matrix that is zero.
        facts: numbers of the method's own, by name.
        node: of the cluster that merged it, where one did.
        device: the kind of device there.
        started: when that began, in seconds since the epoch.
    """

    name: str = ""
    method: str = ""
    rule: str = ""
    shape: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss: int | None = None
    peak_device: int | None = None
    routes: tuple[str, ...] = ()
    kept: tuple[int, ...] = ()
    iterations: int | None = None
    residual: float | None = None
    converged: bool | None = None
    condition: float | None = None
    energy: float | None = None
    ridge: float | None = None
    cutoff: float | None = None
    alpha_ratio: tuple[float, ...] = ()
    spectra: tuple[tuple[float, ...], ...] = ()
    norms: tuple[float, ...] = ()
    norm_sum: float | None = None
    norm_merged: float | None = None
    cosine: tuple[tuple[float, ...], ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    node: str = ""
    device: str = ""
    started: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was computed, as plain data."""
        plain = Record()
        return {k: v for k, v in asdict(self).items() if v != getattr(plain, k)}
