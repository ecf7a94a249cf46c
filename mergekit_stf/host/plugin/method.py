"""Our merge methods as mergekit knows them, and how they get known."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
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

from mergekit_stf.core import STFError, methods
from mergekit_stf.core.methods import Method
from mergekit_stf.host import architectures
from mergekit_stf.host.architectures import all_weights, coverage
from mergekit_stf.host.merging.desk import Desk, Environment, desk_of_environment, read_environment
from mergekit_stf.host.merging.job import WeightJob
from mergekit_stf.host.plugin import saving
from mergekit_stf.host.plugin.groups import make_job
from mergekit_stf.host.plugin.parameters import parameters_of
from mergekit_stf.host.run.signals import add_note

LOG = logging.getLogger("mergekit_stf")
PLAN = "`mergekit-stf plan CONFIG` checks the whole recipe, before anything is merged."


class HostMethod(GroupMergeMethod):
    """A merge method of ours as a method of mergekit 0.1.5.

    The host calls the registered object by its name. The desk at which jobs are run is this
    object's: that of the merge that has called ``at``, else one that the environment describes.

    Args:
        method: the merge method.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.title,
            reference_url=method.url or None,
            parameters=parameters_of(method),
            contract=InputContract(base=BasePolicy.OPTIONAL, min_inputs=2),
            optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
        )
        self._desk: Desk | None = None
        self._named: dict[Environment, Desk] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at(self, desk: Desk) -> Iterator[None]:
        """Run all jobs inside the block at this desk."""
        before, self._desk = self._desk, desk
        try:
            yield
        finally:
            self._desk = before

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
        with self._pointing_to_plan():
            self._check_inputs(input_ids, base_id, group_name)

    def _check_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None
    ) -> None:
        where = f" (at {group_name})" if group_name else ""
        if base_id is None:
            raise STFError(
                f"{self.method.name} needs `base_model`, the checkpoint that the models were tuned "
                f"from{where}; got none. Add `base_model: PATH` to the recipe"
            )
        if base_id not in input_ids:
            raise STFError(
                f"the base model {base_id} lacks this weight{where}; "
                "merge models of one architecture, or take the base from which they were tuned"
            )
        if len(input_ids) < 2:
            raise STFError(
                f"{self.method.name} needs at least one model besides the base model{where}; "
                "got none"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        coverage.guard_planning(self.method.name, input_ids, base_id, group_name)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one weight.

        Returns:
            ``P = P0 + lambda M`` in the type of the inputs; the base itself, bit for bit, where no
            model differs from it.

        Raises:
            STFError: an input is not finite, or its type cannot be merged.
        """
        return self.desk.run(self._make_job(group, parameters)).tensor

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
            kind = aligned.base.tensor.device.type
            with torch.autocast(device_type=kind, enabled=False), self._pointing_to_plan():
                job = self._make_job(aligned, bound, out_dtype)
                results.append(self.desk.run(job).tensor)
        return tuple(results)

    def _make_job(
        self,
        group: TensorGroup,
        parameters: dict[str, Any],
        out_dtype: torch.dtype | None = None,
    ) -> WeightJob:
        """Return the job of a weight; where whole models must be read, one thread does."""
        reading = self._lock if self.method.whole_models else contextlib.nullcontext()
        with reading:
            return make_job(self.method, group, parameters, out_dtype)

    @contextlib.contextmanager
    def _pointing_to_plan(self) -> Iterator[None]:
        """Add to an error that ends the host's own command what checks a whole recipe."""
        try:
            yield
        except STFError as error:
            if self._desk is None:
                add_note(error, PLAN)
            raise

    @property
    def desk(self) -> Desk:
        """The desk at which jobs are run; the host asks for it from several threads."""
        if self._desk is not None:
            return self._desk
        with self._lock:
            variables = read_environment()
            if variables not in self._named:
                self._named[variables] = desk_of_environment()
                atexit.register(self._named[variables].notices.close)
            return self._named[variables]


def register_with_mergekit() -> None:
    """Make our methods, architecture tables and check of overflow known to mergekit, once.

    Where the host has a method of one of these names itself, the host's stays, with one warning.
    """
    architectures.register_tables()
    all_weights.install()
    saving.check_before_saving()
    known = {method.spec.name: method for method in registered_methods()}
    for name in methods.names():
        if name not in known:
            register_with_host(HostMethod(methods.get(name)))
        elif not isinstance(known[name], HostMethod):
            LOG.warning("mergekit has a merge method %s of its own, which is used", name)


def host_method(name: str) -> HostMethod:
    """Return the registered method of ours of that name.

    Raises:
        STFError: there is none.
    """
    for method in registered_methods():
        if method.spec.name == name and isinstance(method, HostMethod):
            return method
    raise STFError(
        f"{name!r} is no merge method of mergekit-stf; ours are {', '.join(registered_names())}"
    )


def registered_names() -> list[str]:
    """Return the names of the registered methods that are ours."""
    return [m.spec.name for m in registered_methods() if isinstance(m, HostMethod)]
