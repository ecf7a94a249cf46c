"""One weight of a merge, merged in a process that knows of nothing but the order.

The worker runs the host's own task of the weight, which reads its tensors from the models' files
and calls our method, so that it does exactly what a merge in one process does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest.mock import patch

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.graph import Executor
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_stf.host.checkpoints.dequantised import DequantisingLoader
from mergekit_stf.host.checkpoints.quantised import find_quantisation
from mergekit_stf.host.compat import close_checkpoints, keep_open
from mergekit_stf.host.executors.carried import (
    CarriedNotices,
    CarriedRecords,
    CarriedStore,
    InStore,
)
from mergekit_stf.host.executors.messages import Merge, Order, Packed, Reply
from mergekit_stf.host.executors.nodes import Located, check_node, kind_of_device
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.plugin.method import host_method


def merge_here(order: Order, merge: Merge, node: str, device: torch.device) -> Reply:
    """Merge one weight.

    Args:
        order: the weight.
        merge: what it has in common with the others.
        node: the name of this machine.
        device: where to merge.

    Raises:
        STFError: this machine lacks something, or what is wrong with the weight.
    """
    _begin(merge, node)
    started = time.time()
    store, records, notices = CarriedStore(order, merge.known), CarriedRecords(), CarriedNotices()
    reply = Reply(node, kind_of_device(device))
    method = host_method(order.task.tensor_task.method_name)
    with warnings.catch_warnings(record=True) as warned, _placed(merge):
        warnings.simplefilter("always")
        try:
            with method.at(Desk(store, records, notices)):
                tensor = run_task(order.task, device, merge.options)
        except InStore as found:
            return replace(reply, wanted=found.key)
    return replace(
        reply,
        tensor=None if tensor is None else Packed.of(tensor),
        entries=tuple(store.entries),
        records=tuple(
            replace(record, node=node, device=reply.device, started=started)
            for record in records.records
        ),
        notices=tuple(notices.notices),
        warnings=tuple((str(one.message), one.category) for one in warned),
    )


def run_task(task: SaveTensor, device: torch.device, options: MergeOptions) -> Tensor | None:
    """Run the host's task of a weight up to the tensor that is to be written.

    Returns:
        The tensor, in the type to write, on the CPU; None for an optional weight without inputs.
    """
    storage = device if options.low_cpu_memory else torch.device("cpu")
    executor = Executor([task.tensor_task], math_device=device, storage_device=storage)
    ((_, tensor),) = executor.run(quiet=True)
    return rounded_tensor(task, tensor)


def rounded_tensor(task: SaveTensor, tensor: Tensor | None) -> Tensor | None:
    """Return what the host's task of saving a weight would hand to the writer, on the CPU."""
    held = _Held()
    task.execute(writer=held, tensor=tensor)
    return held.tensor


@dataclass
class _Held:
    """In the place of the host's writer: one tensor."""

    tensor: Tensor | None = None

    def save_tensor(self, name: str, tensor: Tensor, clone: bool) -> None:
        self.tensor = tensor.cpu()


@lru_cache(maxsize=1)
def _begin(merge: Merge, node: str) -> None:
    """Check this machine and open the models, once for all weights of a merge."""
    options = merge.options
    check_node(merge.expected, node, options.transformers_cache)
    torch.set_num_threads(merge.threads)
    close_checkpoints()
    LoaderCache().setup(options)
    for model in merge.expected.models:
        keep_open(model.reference, _opened(model, options))


def _opened(model: Located, options: MergeOptions) -> LazyTensorLoader:
    folder = model.here(options.transformers_cache)
    stored = LazyTensorLoader.from_disk(str(folder), options.lazy_unpickle)
    if not model.quantised:
        return stored
    found = find_quantisation(ModelReference(model=ModelPath(path=str(folder))), options)
    assert found is not None  # its files are those of the driver
    return DequantisingLoader(stored, found)


@contextmanager
def _placed(merge: Merge) -> Iterator[None]:
    """Let the host read each model's configuration where the model lies on this machine."""
    cache = merge.options.transformers_cache
    folders = {model.reference: model.here(cache) for model in merge.expected.models}
    read = ModelReference.config

    def config(model: ModelReference, trust_remote_code: bool = False) -> PretrainedConfig:
        path = ModelPath(path=str(folders[model]))
        place = ModelReference(model=path, override_architecture=model.override_architecture)
        return read(place, trust_remote_code)

    with patch.object(ModelReference, "config", config):
        yield
