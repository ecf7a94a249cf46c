"""``merge_method: stf``: the method as mergekit knows it, and how it gets known."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype
from mergekit.merge_methods.registry import register as register_with_host
from mergekit.merge_methods.registry import registered_methods
from torch import Tensor

from mergekit_stf.core import STFError
from mergekit_stf.host import architectures
from mergekit_stf.host.architectures import all_weights, coverage
from mergekit_stf.host.merging.weights import merge_weight
from mergekit_stf.host.plugin import saving
from mergekit_stf.host.plugin.parameters import PARAMETERS

NAME = saving.NAME


class SuperposeTaskFeatures(GroupMergeMethod):
    """STF as a method of mergekit 0.1.5."""

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="STF",
        reference_url="https://arxiv.org/abs/2502.10698",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.OPTIONAL, min_inputs=2),
        optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
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
        return merge_weight(group, parameters, group.base.tensor.dtype)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge group by group, rounding once, to ``out_dtype`` where the caller gives one."""
        results = []
        for group, bound, dtype in zip(groups, parameters, input_dtypes, strict=True):
            aligned = align_dtype(group, dtype)
            base = aligned.base.tensor
            with torch.autocast(device_type=base.device.type, enabled=False):
                results.append(merge_weight(aligned, bound, out_dtype or base.dtype))
        return tuple(results)


def register() -> None:
    """Make ``stf``, our architecture tables and our check of overflow known to mergekit, once."""
    architectures.register()
    all_weights.install()
    saving.register()
    if any(method.spec.name == NAME for method in registered_methods()):
        return
    register_with_host(SuperposeTaskFeatures())
