"""From what the host hands to a merge method to a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorGroup

from mergekit_stf.core.methods import Method
from mergekit_stf.host.architectures.loading import parameter_names
from mergekit_stf.host.checkpoints.content import checksum, digest
from mergekit_stf.host.diagnostics.notices import Notice
from mergekit_stf.host.diagnostics.rounding import find_rounded_inputs
from mergekit_stf.host.merging.job import Task, WeightJob
from mergekit_stf.host.merging.kinds import kind_for
from mergekit_stf.host.merging.split import parse_split
from mergekit_stf.host.merging.whole_models import measure_if_asked
from mergekit_stf.host.plugin.parameters import IGNORED


def make_job(
    method: Method,
    group: TensorGroup,
    parameters: Mapping[str, Any],
    out_dtype: torch.dtype | None = None,
) -> WeightJob:
    """Return the job of one weight.

    Args:
        method: the merge method.
        group: the base's tensor and the models', of one type, on one device.
        parameters: every parameter of the method, checked.
        out_dtype: the type to write, None for that of the base.
    """
    name = group.metadata.name or "a weight without a name"
    base = group.base.tensor
    models = [entry.id for entry in group.non_base]
    distances = measure_if_asked(method, group.base.id, models)
    tasks = [
        Task(
            str(entry.id),
            tuned=entry.tensor,
            weight=parameters["weight"][entry.id],
            density=parameters["density"][entry.id],
            squared_distance=distance,
        )
        for entry, distance in zip(group.non_base, distances, strict=True)
    ]
    options = {option.name: parameters[option.name] for option in method.options}
    return WeightJob(
        name=name,
        kind=kind_for(name, base.shape, group.metadata.vocabulary_axis),
        base=base,
        tasks=tuple(sort_tasks(tasks)),
        method=method.name,
        options=options,
        rule=parameters["rule"],
        scale=parameters["lambda"],
        split=parse_split(parameters["split"]),
        input_axis=input_axis_of(method, options, group.base.id, name),
        out_dtype=out_dtype,
        base_model=group.base.id,
        notices=(*_find_ignored(method, parameters), *find_rounded_inputs(name, group.entries)),
    )


def input_axis_of(method: Method, options: Mapping[str, Any], base: Hashable, name: str) -> int:
    """Return the axis of a weight that meets the inputs, 1 where nothing says otherwise.

    Args:
        method: asks only if its answer depends on it.
        options: the method's own.
        base: the base model, where it is one of the host's references.
        name: of the weight.
    """
    if not method.knows_sides(options) or not isinstance(base, ModelReference):
        return 1
    names = parameter_names(base.config(LoaderCache().trust_remote_code))
    return 1 if names is None else names.input_axis(name)


def sort_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks of whole tensors in an order that does not depend on the recipe's.

    Sums round differently in another order, and the order of models in a recipe means nothing to
    our methods: so that it costs no byte either, tasks are sorted by an integer checksum of their
    tensors, which is computed where they lie, and by a digest of their bytes where checksums are
    equal.
    """
    if len(tasks) < 2:
        return list(tasks)
    sums = [checksum(task.tuned) for task in tasks]  # type: ignore[arg-type]
    counts = Counter(sums)
    keys = [
        (total, digest(task.tuned) if counts[total] > 1 else "", task.weight, task.density)  # type: ignore[arg-type]
        for total, task in zip(sums, tasks, strict=True)
    ]
    return [tasks[index] for index in sorted(range(len(tasks)), key=keys.__getitem__)]


def _find_ignored(method: Method, parameters: Mapping[str, Any]) -> Iterator[Notice]:
    """Yield which parameters of a TIES recipe have no meaning here."""
    for name in IGNORED:
        value = parameters.get(name)
        if value is not None:
            text = f"{method.name} has no use for `{name}: {value}` and ignores it; remove the line"
            yield Notice(f"ignored {name}", text)
