"""The weights of a merge as the host plans them: names, rules, shapes, sources, parameters.

The host's own planner decides, so filters, gradients, slices, modules and optional weights
come out here as they do in the merge. Only headers are read until ``load`` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_stf.core import methods
from mergekit_stf.core.methods import Kind
from mergekit_stf.core.methods.method import MERGE
from mergekit_stf.host.architectures.all_weights import architecture_of
from mergekit_stf.host.checkpoints.headers import Header, header_of
from mergekit_stf.host.compat import output_config
from mergekit_stf.host.merging.job import Task, WeightJob, resolve_rule, rule_label
from mergekit_stf.host.merging.kinds import kind_for
from mergekit_stf.host.merging.split import parse_split as parse_split
from mergekit_stf.host.merging.whole_models import measure_if_asked
from mergekit_stf.host.plugin.groups import input_axis_of
from mergekit_stf.host.store.jobs import is_worth


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of a merge.

    Attributes:
        name: its name in the output.
        method: the merge method.
        kind: what the weight is in its model.
        rule: the rule that merges it, as tables show it.
        header: shape and type as stored in the base.
        dtype: the type in which the method gets it.
        out_dtype: the type in which it is written.
        base: the base model.
        models: the tuned models, in the order of the recipe.
        weight: the parameter ``weight`` of each tuned model.
        density: the parameter ``density`` of each tuned model.
        shared: the parameters without a model, ``lambda`` among them.
        loads: for each model, the host's task that loads its tensor.
        vocabulary_axis: the axis that is indexed by token, None where there is none.
        realigned: whether the host aligns the vocabularies of the inputs before the merge.
    """

    name: str
    method: str
    kind: Kind
    rule: str
    header: Header
    dtype: torch.dtype
    out_dtype: torch.dtype
    base: ModelReference
    models: tuple[ModelReference, ...]
    weight: tuple[float, ...]
    density: tuple[float, ...]
    shared: dict[str, Any]
    loads: dict[ModelReference, LoadTensor]
    vocabulary_axis: int | None
    realigned: bool

    @property
    def numel(self) -> int:
        """Entries of one tensor."""
        return torch.Size(self.header.shape).numel()

    @property
    def resolved_rule(self) -> str:
        """The rule as ``WeightJob.resolved_rule`` has it."""
        return resolve_rule(methods.get(self.method), self.kind, self.shared["rule"])

    @property
    def is_maps(self) -> bool:
        """Say whether its method merges it as one or several linear maps."""
        whole = methods.get(self.method).takes_whole(self.kind)
        return self.resolved_rule == MERGE and not whole

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return {o.name: self.shared[o.name] for o in methods.get(self.method).options}

    @property
    def stored_bytes(self) -> int:
        """Bytes of this weight in the store, 0 if it is not stored."""
        worth = is_worth(self.resolved_rule, len(self.header.shape), self.density)
        return self.numel * max(self.dtype.itemsize, torch.float32.itemsize) if worth else 0

    def split_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Take a tensor of this weight apart into the matrices that are merged one by one.

        These are the experts of a stack, the maps of a fused projection, or the matrix itself.
        """
        if tensor.ndim == 3:
            return [piece for expert in tensor for piece in self.split_tensor(expert)]
        split = parse_split(self.shared["split"])
        if split is None:
            return [tensor]
        return [tensor[index] for index in split.indices(tensor.shape)]

    def job(self, base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> WeightJob:
        """Return the merge of this weight, of tensors that were read."""
        distances = measure_if_asked(methods.get(self.method), self.base, self.models)
        settings = zip(self.models, tuned, self.weight, self.density, distances, strict=True)
        return WeightJob(
            name=self.name,
            kind=self.kind,
            base=base,
            tasks=tuple(
                Task(str(model), tuned=tensor, weight=w, density=d, squared_distance=distance)
                for model, tensor, w, d, distance in settings
            ),
            method=self.method,
            options=self.options,
            rule=self.shared["rule"],
            scale=self.shared["lambda"],
            split=parse_split(self.shared["split"]),
            input_axis=input_axis_of(methods.get(self.method), self.options, self.base, self.name),
            out_dtype=self.out_dtype,
            base_model=self.base,
        )

    def load(self, model: ModelReference) -> torch.Tensor | None:
        """Read this weight of one model, None where an optional weight is missing."""
        tensor: torch.Tensor | None = self.loads[model].execute()
        return tensor


def plan_weights(config: MergeConfiguration, options: MergeOptions) -> list[PlannedWeight]:
    """Plan a merge as the host would and return its weights in the host's order.

    Raises:
        RuntimeError: what the host's planner raises on models that do not fit together.
    """
    config = config.model_copy(deep=True)
    architecture, _ = architecture_of(config, options)
    out_config = output_config(config, architecture, options.trust_remote_code)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
    # The host's plan_in_memory() does not validate; this plan writes nothing until it is executed.
    tasks = planner.plan_to_disk(out_path="")
    return [planned_weight(task) for task in tasks if isinstance(task, SaveTensor)]


def planned_weight(saving: SaveTensor) -> PlannedWeight:
    """Return the weight that the host's task of saving is about.

    Args:
        saving: of a weight that a method of ours merges.
    """
    task: ExecuteMergeMethodTask = saving.tensor_task
    source = task.gather_tensors
    gather = source if isinstance(source, GatherTensors) else source.gather_tensors
    tasks = gather.arguments()
    loads = {model: tasks[f"{model}:{info.name}"] for model, info in gather.weight_info.items()}
    header = header_of(loads[task.base_model])
    weight = task.output_weight
    shared = dict(task.parameters.items())
    method = methods.get(task.method_name)
    kind = kind_for(weight.name, header.shape, weight.vocabulary_axis)
    dtype = dtype_from_name(loads[task.base_model].dtype) or header.dtype
    models = tuple(model for model in task.model_order if model != task.base_model)
    inputs = task.input_parameters
    return PlannedWeight(
        name=weight.name,
        method=method.name,
        kind=kind,
        rule=rule_label(method, resolve_rule(method, kind, shared["rule"])),
        header=header,
        dtype=dtype,
        out_dtype=dtype_from_name(saving.dtype) or dtype,
        base=task.base_model,
        models=models,
        weight=tuple(inputs[model]["weight"] for model in models),
        density=tuple(inputs[model]["density"] for model in models),
        shared=shared,
        loads=loads,
        vocabulary_axis=weight.vocabulary_axis,
        realigned=source is not gather,
    )
