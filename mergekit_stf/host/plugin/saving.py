"""The host rounds to ``out_dtype`` after a method has answered; here it looks before it does so.

Only weights that a method of ours merged are looked at; every other task of the host runs as it is.
"""

from __future__ import annotations

from functools import cache, wraps

from mergekit.common import dtype_from_name
from mergekit.io.tasks import SaveTensor
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_stf.core import methods
from mergekit_stf.host.compat import replace_saving
from mergekit_stf.host.merging.finite import is_finite, round_weight


@cache
def check_before_saving() -> None:
    """Let the host's task that writes a weight refuse one that its type cannot hold; once."""
    write = SaveTensor.execute

    @wraps(write)
    def execute(self: SaveTensor, writer: TensorWriter, tensor: Tensor | None) -> None:
        write(self, writer, _round(self, tensor))

    replace_saving(execute)


def _round(task: SaveTensor, tensor: Tensor | None) -> Tensor | None:
    """Round what has been merged; infinite masks of the base were let through by the merge."""
    merged = task.tensor_task
    ours = isinstance(merged, ExecuteMergeMethodTask) and methods.is_known(merged.method_name)
    dtype = dtype_from_name(task.dtype)
    if tensor is None or dtype is None or not ours or not is_finite(tensor):
        return tensor
    return round_weight(task.tensor_name, tensor, dtype)
