"""One weight: its inputs checked, merged by its rule, through the store, rounded and recorded.

The kernel is ``mergekit_stf.core``; this module forms the task matrices, applies the paper's
Algorithm 2 to what is no linear map, adds ``lambda M`` to the base and rounds once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from pydantic import TypeAdapter
from torch import Tensor

from mergekit_stf.core import Report, STFError, superpose
from mergekit_stf.host.diagnostics import notices, rounding
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.merging.finite import check_finite, copied, rounded
from mergekit_stf.host.merging.kinds import rule_for
from mergekit_stf.host.merging.split import parse as parse_split
from mergekit_stf.host.merging.tasks import Task, check_type, deltas, ordered, same_bits
from mergekit_stf.host.store import store

REPORTS = TypeAdapter(list[Report])
"""Reads and writes the reports that the store keeps beside a matrix."""


def merge_weight(
    group: TensorGroup, parameters: Mapping[str, Any], out_dtype: torch.dtype
) -> Tensor:
    """Check one weight's inputs, merge them by their rule, and record what was done."""
    name = group.metadata.name or "a weight without a name"
    notices.ignored(parameters)
    rounding.note(name, group.entries)
    base: Tensor = group.base.tensor
    tasks = ordered(group, parameters["weight"], parameters["density"])
    unchanged = all(same_bits(task.tuned, base) for task in tasks)
    if not unchanged:
        check_type(name, base.dtype)
    if unchanged or parameters["rule"] == "base":
        if not unchanged:
            check_finite(name, [(task.label, task.tuned) for task in tasks])
        return copied(name, base, out_dtype, group.base.id)
    rule = parameters["rule"]
    if rule == "auto":
        rule = rule_for(name, base.shape, group.metadata.vocabulary_axis)
    started = time.perf_counter()
    merged, reports = merge(name, base, tasks, rule, parameters)
    notices.ill_posed(name, [task.label for task in tasks], reports)
    recorder = diagnostics.active()
    if recorder is not None:
        recorder.record(
            name=name,
            rule=rule,
            shape=list(base.shape),
            models=[task.label for task in tasks],
            seconds=time.perf_counter() - started,
            device=base.device,
            reports=reports,
        )
    return rounded(name, merged, out_dtype)


def merge(
    name: str, base: Tensor, tasks: Sequence[Task], rule: str, parameters: Mapping[str, Any]
) -> tuple[Tensor, list[Report]]:
    """Return the merged weight, not yet rounded, and the reports of its superpositions."""
    compute = torch.promote_types(base.dtype, torch.float32)
    reports: list[Report] = []
    scale = 1 / len(tasks) if rule == "mean" else parameters["lambda"]
    if rule == "superpose":
        M, reports = merged_matrix(name, base, tasks, compute, parameters)
    else:
        M = merged_sum(name, base, tasks, rule, compute)
    return torch.add(base.to(compute), M, alpha=scale), reports


def merged_sum(
    name: str, base: Tensor, tasks: Sequence[Task], rule: str, compute: torch.dtype
) -> Tensor:
    """Return ``Σ w_i τ_i``, from the store if one is active and trimming takes longer."""
    worth = store.is_worth(rule, base.ndim, [task.density for task in tasks])
    shelf = store.active() if worth else None
    total, _ = shelved(
        shelf, name, base, tasks, {"rule": "sum"}, lambda: (added(base, tasks, compute), [])
    )
    return total


def added(base: Tensor, tasks: Sequence[Task], compute: torch.dtype) -> Tensor:
    """Return ``Σ w_i τ_i`` (Algorithm 2, lines 12 to 16)."""
    total = torch.zeros_like(base, dtype=compute)
    for delta in deltas(base, tasks, compute):
        total += delta
    return total


def merged_matrix(
    name: str,
    base: Tensor,
    tasks: Sequence[Task],
    compute: torch.dtype,
    parameters: Mapping[str, Any],
) -> tuple[Tensor, list[Report]]:
    """Return M of a matrix or a stack of matrices, from the store if one is active."""
    if base.ndim not in (2, 3):
        raise STFError(
            f"{name}: only matrices and stacks of matrices can be superposed, got shape "
            f"{tuple(base.shape)}; set `rule: sum` for this weight"
        )
    options = {
        "rank": parameters["rank"],
        "ridge": parameters["ridge"],
        "split": str(parameters["split"]),
    }
    make = partial(superposed, name, base, tasks, compute, parameters)
    return shelved(store.active(), name, base, tasks, options, make)


def shelved(
    shelf: store.Store | None,
    name: str,
    base: Tensor,
    tasks: Sequence[Task],
    options: Mapping[str, object],
    make: Callable[[], tuple[Tensor, list[Report]]],
) -> tuple[Tensor, list[Report]]:
    """Return what ``make`` makes of checked inputs, from the store if it is there.

    The values of inputs whose answer is in the store were checked before it was made.
    """
    if shelf is None:
        check_values(name, base, tasks)
        return make()
    options = {
        **options,
        "weights": [task.weight for task in tasks],
        "densities": [task.density for task in tasks],
    }
    key = shelf.key([base, *(task.tuned for task in tasks)], options)
    kept = shelf.get(key, partial(restored, base, len(tasks)))
    if kept is not None:
        M, reports = kept
        return M.to(base.device), reports
    check_values(name, base, tasks)
    M, reports = make()
    shelf.put(key, M, REPORTS.dump_json(reports).decode())
    return M, reports


def restored(base: Tensor, tasks: int, M: Tensor, note: str) -> tuple[Tensor, list[Report]]:
    """Return the matrix and the reports of an entry of the store.

    Args:
        base: the weight that it belongs to.
        tasks: their number.
        M: the matrix.
        note: the reports as they were stored.

    Raises:
        ValueError: matrix or note cannot be what was stored for this weight.
    """
    compute = torch.promote_types(base.dtype, torch.float32)
    if M.shape != base.shape or M.dtype != compute:
        raise STFError(f"it holds {M.dtype} of shape {tuple(M.shape)}")
    reports = REPORTS.validate_json(note)
    for report in reports:
        lists = (report.routes, report.ranks, report.norms, report.spectra, report.overlaps)
        if any(len(one) != tasks for one in (*lists, *report.overlaps)):
            raise STFError(f"its note tells of another number of tasks than {tasks}")
    return M, reports


def check_values(name: str, base: Tensor, tasks: Sequence[Task]) -> None:
    """Refuse inputs with NaN or infinity.

    Raises:
        STFError: with the model and the weight.
    """
    check_finite(name, [("base_model", base), *((t.label, t.tuned) for t in tasks)])


def superposed(
    name: str,
    base: Tensor,
    tasks: Sequence[Task],
    compute: torch.dtype,
    parameters: Mapping[str, Any],
) -> tuple[Tensor, list[Report]]:
    """Superpose a matrix, or one by one the experts of a stack and the maps of a fused projection.

    Raises:
        STFError: the parameter ``split`` does not fit the shape.
    """
    if base.ndim == 3:
        return superposed_parts(name, base, tasks, compute, parameters, range(base.shape[0]))
    if (split := parse_split(parameters["split"])) is not None:
        try:
            parts = list(split.indices(base.shape))
        except ValueError as error:
            raise STFError(f"{name}: {error}") from error
        whole = {**parameters, "split": "none"}
        return superposed_parts(name, base, tasks, compute, whole, parts)
    result = superpose(
        deltas(base, tasks, compute),
        rank=parameters["rank"],
        ridge=None if parameters["ridge"] == "auto" else parameters["ridge"],
        source_dtype=base.dtype,
        name=name,
    )
    return result.M, [result.report]


def superposed_parts(
    name: str,
    base: Tensor,
    tasks: Sequence[Task],
    compute: torch.dtype,
    parameters: Mapping[str, Any],
    parts: Iterable[Any],
) -> tuple[Tensor, list[Report]]:
    """Superpose the parts at these indices one after another, which bounds the memory."""
    merged = torch.empty_like(base, dtype=compute)
    reports: list[Report] = []
    for number, index in enumerate(parts):
        own = [Task(t.label, t.tuned[index], t.weight, t.density) for t in tasks]
        merged[index], report = superposed(
            f"{name}[{number}]", base[index], own, compute, parameters
        )
        reports += report
    return merged, reports
