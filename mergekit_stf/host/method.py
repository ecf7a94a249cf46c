"""``merge_method: stf``: from mergekit's group of tensors to one merged tensor.

The kernel is ``mergekit_stf.core``; this module forms the task matrices, applies the paper's
Algorithm 2 to what is no linear map, adds ``lambda M`` to the base and rounds once.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    TensorGroup,
)
from mergekit.merge_methods.registry import register as register_with_host
from mergekit.merge_methods.registry import registered_methods
from torch import Tensor

from mergekit_stf.core import Report, STFError, superpose, trim
from mergekit_stf.host import coverage, diagnostics, notices, store
from mergekit_stf.host.parameters import PARAMETERS
from mergekit_stf.host.rules import rule_for

NAME = "stf"


@dataclass(frozen=True)
class Task:
    """One tuned model's version of a weight.

    Attributes:
        label: the model, as errors and reports name it.
        tuned: its tensor, in the type that the host aligned all inputs to.
        weight: scales the task matrix.
        density: fraction of the task matrix that trimming keeps.
    """

    label: str
    tuned: Tensor
    weight: float
    density: float


class SuperposeTaskFeatures(GroupMergeMethod):
    """STF as a method of mergekit 0.1.5."""

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="STF",
        reference_url="https://arxiv.org/abs/2502.10698",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.OPTIONAL),
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the inputs of a slice or a weight before anything is merged.

        Raises:
            STFError: there is no base model, no tuned one, or weights would be lost.
        """
        where = f" (at {group_name})" if group_name else ""
        if base_id is None:
            raise STFError(
                "stf needs `base_model`, the checkpoint that the models were tuned from"
                f"{where}; got none. Add `base_model: PATH` to the recipe"
            )
        if base_id not in input_ids:
            raise STFError(
                f"the base model {base_id} lacks this weight{where}; "
                "merge models of one architecture, or take the base from which they were tuned"
            )
        if len(input_ids) < 2:
            raise STFError(f"stf needs at least one model besides the base model{where}; got none")
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        coverage.guard(input_ids, base_id, group_name)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one weight.

        Returns:
            ``P = P0 + lambda M`` in the type of the inputs; the base itself, bit for bit, where no
            model differs from it.

        Raises:
            STFError: an input is not finite, or its type cannot be merged.
        """
        name = group.metadata.name or "a weight without a name"
        notices.ignored(parameters)
        base: Tensor = group.base.tensor
        tasks = ordered(group, parameters["weight"], parameters["density"])
        changed = [not torch.equal(task.tuned, base) for task in tasks]
        if not any(changed) or parameters["rule"] == "base":
            check_finite(name, [("base_model", base), *((t.label, t.tuned) for t in tasks)])
            return base
        check_type(name, base.dtype)
        check_finite(name, [("base_model", base), *((t.label, t.tuned) for t in tasks)])
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
        return merged


def ordered(
    group: TensorGroup, weights: Mapping[Hashable, float], densities: Mapping[Hashable, float]
) -> list[Task]:
    """Return the tuned tensors in an order that does not depend on the recipe's.

    Sums round differently in another order, and the order of models in a recipe means nothing to
    STF: so that it costs no byte either, tasks are sorted by an integer checksum of their tensors.
    """
    tasks = [
        Task(str(entry.id), entry.tensor, weights[entry.id], densities[entry.id])
        for entry in group.non_base
    ]
    if len(tasks) < 2:
        return tasks
    return sorted(tasks, key=lambda task: (checksum(task.tuned), task.weight, task.density))


def checksum(x: Tensor) -> int:
    """Return the sum of a tensor's bit patterns as integers, the same on every device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().contiguous().view(-1).view(integers[x.element_size()])
    return int(bits.sum(dtype=torch.int64))


def check_type(name: str, dtype: torch.dtype) -> None:
    """Refuse types that cannot hold a merged weight.

    Raises:
        STFError: the weight is quantised.
    """
    if dtype.itemsize < 2:
        raise STFError(
            f"{name}: {str(dtype).removeprefix('torch.')} weights differ between the models and "
            "cannot be merged; dequantise the checkpoints first, or set `dtype: bfloat16`"
        )


def check_finite(name: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinity.

    Raises:
        STFError: with the model and the weight.
    """
    for label, x in tensors:
        if not bool(torch.isfinite(x).all()):
            count = int(x.numel() - torch.isfinite(x).sum())
            raise STFError(
                f"{name}: {label} has {count} entries that are NaN or infinite; "
                "mend that checkpoint or leave the model out"
            )


def merge(
    name: str, base: Tensor, tasks: Sequence[Task], rule: str, parameters: Mapping[str, Any]
) -> tuple[Tensor, list[Report]]:
    """Return the merged weight in the type of ``base``, and the reports of its superpositions."""
    compute = torch.promote_types(base.dtype, torch.float32)
    reports: list[Report] = []
    if rule == "superpose":
        M, reports = merged_matrix(name, base, tasks, compute, parameters)
        scale = parameters["lambda"]
    elif rule == "mean":
        M, scale = added(base, tasks, compute), 1 / len(tasks)
    else:
        M, scale = added(base, tasks, compute), parameters["lambda"]
    return torch.add(base.to(compute), M, alpha=scale).to(base.dtype), reports


def deltas(base: Tensor, tasks: Sequence[Task], compute: torch.dtype) -> Iterator[Tensor]:
    """Yield the task matrices ``w_i (P_i - P0)``, trimmed, one at a time (Algorithm 2, 4-5)."""
    reference = base.to(compute)
    for task in tasks:
        delta = task.tuned.to(compute) - reference
        if task.weight != 1:
            delta.mul_(task.weight)
        yield trim(delta, task.density)


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
    shelf = store.active()
    if shelf is None:
        return superposed(name, base, tasks, compute, parameters)
    options = {
        "rank": parameters["rank"],
        "ridge": parameters["ridge"],
        "weights": [task.weight for task in tasks],
        "densities": [task.density for task in tasks],
    }
    key = shelf.key([base, *(task.tuned for task in tasks)], options)
    kept = shelf.get(key)
    if kept is not None:
        return kept.to(base.device), []
    M, reports = superposed(name, base, tasks, compute, parameters)
    shelf.put(key, M)
    return M, reports


def superposed(
    name: str,
    base: Tensor,
    tasks: Sequence[Task],
    compute: torch.dtype,
    parameters: Mapping[str, Any],
) -> tuple[Tensor, list[Report]]:
    """Superpose a matrix, or a stack of experts one by one, which bounds the memory."""
    if base.ndim == 3:
        merged = torch.empty_like(base, dtype=compute)
        reports = []
        for index in range(base.shape[0]):
            slices = [Task(t.label, t.tuned[index], t.weight, t.density) for t in tasks]
            merged[index], report = superposed(
                f"{name}[{index}]", base[index], slices, compute, parameters
            )
            reports += report
        return merged, reports
    result = superpose(
        deltas(base, tasks, compute),
        rank=parameters["rank"],
        ridge=None if parameters["ridge"] == "auto" else parameters["ridge"],
        source_dtype=base.dtype,
        name=name,
    )
    return result.M, [result.report]


def register() -> None:
    """Make ``stf`` known to mergekit; a second call does nothing."""
    if any(method.spec.name == NAME for method in registered_methods()):
        return
    register_with_host(SuperposeTaskFeatures())
