"""What a merge will take: time by calibration on this device, memory and disk by counting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import psutil
import torch
from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_stf.core import methods
from mergekit_stf.core.methods.method import MERGE
from mergekit_stf.core.pool import workspace
from mergekit_stf.core.solve.gram import blocks_size
from mergekit_stf.host.checkpoints.headers import header_if_any
from mergekit_stf.host.diagnostics.memory import peak_rss
from mergekit_stf.host.merging.whole_models import squared_length
from mergekit_stf.host.planning.calibrate import time_workloads, workload_of
from mergekit_stf.host.planning.file_speed import SAMPLE, FileSpeed
from mergekit_stf.host.planning.planned import PlannedWeight

ELEMENTWISE = 8
"""Matrices that the hungriest elementwise method, ``pcb``, needs besides those of the tasks; the
others need four (measured with two and eight models, 3000 x 3000)."""


class Estimate(BaseModel):
    """Time and memory of a merge with ``mergekit-stf merge``.

    Attributes:
        device: where weights are merged.
        seconds: of the whole process.
        starting: of it, imports, checks and planning.
        merging: of it, the method.
        files: of it, hashing the inputs, writing the store and the output.
        memory: peak resident bytes, the mapped input files included.
        mapped: of it, input files, which the system drops when memory is short.
        device_memory: peak bytes on an accelerator, 0 on the CPU.
        output: bytes of the merged weights.
        store: bytes of the store until the merge is done.
        by_weight: seconds of each weight.
    """

    device: str
    seconds: float
    starting: float
    merging: float
    files: float
    memory: int
    mapped: int
    device_memory: int
    output: int
    store: int
    by_weight: dict[str, float]


def estimate_merge(
    weights: Sequence[PlannedWeight], options: MergeOptions, speed: FileSpeed
) -> Estimate:
    """Estimate a merge; takes about two seconds, and reads no weight.

    Args:
        weights: the plan.
        options: the host's options.
        speed: of files on the disk of the output.
    """
    starting = process_age()
    before = peak_rss()
    device = torch.device(options.device or "cpu")
    workloads = {weight.name: workload_of(weight) for weight in weights}
    seconds = time_workloads(list(workloads.values()), device)
    by_weight = {name: seconds[workload] for name, workload in workloads.items()}
    output = sum(weight.numel * weight.out_dtype.itemsize for weight in weights)
    store = sum(weight.stored_bytes for weight in weights)
    mapped = input_bytes(weights)
    writing = (store + output) * speed.writing
    files = mapped * speed.hashing + writing + _reading_seconds(weights)
    merging = sum(by_weight.values())
    work = max((working_bytes(weight, device) for weight in weights), default=0)
    on_card = device.type == "cuda"
    shard = min(output, options.out_shard_size)
    return Estimate(
        device=str(device),
        seconds=starting + merging + files,
        starting=starting,
        merging=merging,
        files=files,
        memory=before + mapped + shard + (0 if on_card else work),
        mapped=mapped,
        device_memory=work if on_card else 0,
        output=output,
        store=store,
        by_weight=by_weight,
    )


def process_age() -> float:
    """Return the seconds since this process started."""
    return float(time.time() - psutil.Process().create_time())


def _matrix_bytes(weight: PlannedWeight) -> int:
    return weight.numel * max(weight.dtype.itemsize, torch.float32.itemsize)


def _reading_seconds(weights: Sequence[PlannedWeight]) -> float:
    """Return seconds to read all models once more, where the method asks for their lengths."""
    asks = [weight for weight in weights if methods.get(weight.method).whole_models]
    entries = sum(weight.numel * len(weight.models) for weight in asks)
    if not entries:
        return 0.0
    sample = torch.ones(SAMPLE // 8, dtype=torch.bfloat16)
    squared_length(sample.float() - sample.float())  # the first call starts threads
    started = time.perf_counter()
    squared_length(sample.float() - sample.float())
    return (time.perf_counter() - started) * entries / sample.numel()


def input_bytes(weights: Sequence[PlannedWeight]) -> int:
    """Return the bytes of the tensors that are read for these weights."""
    headers = (header_if_any(load) for weight in weights for load in weight.loads.values())
    return sum(
        torch.Size(header.shape).numel() * header.dtype.itemsize
        for header in headers
        if header is not None
    )


def working_bytes(weight: PlannedWeight, device: torch.device) -> int:
    """Count what one weight needs while it is merged.

    Float32 copies of the base, one task matrix and the result; for a decomposition besides, the
    features of every task, and the work space of those at a time or the blocks of the solve, matrix
    by matrix of a stack.
    """
    one = _matrix_bytes(weight)
    if weight.resolved_rule != MERGE:
        return 4 * one
    if methods.get(weight.method).elementwise:
        return (len(weight.models) + ELEMENTWISE) * one
    *stack, rows, columns = weight.header.shape
    part = one // (stack[0] if stack else 1)
    side = min(rows, columns)
    features = part * side // columns + part * side // rows
    tasks = len(weight.models)
    most = max(workspace(side, tasks, device), blocks_size(rows, columns, tasks))
    return 2 * one + 3 * part + tasks * features + most


def count_by_rule(weights: Sequence[PlannedWeight]) -> dict[str, tuple[int, int]]:
    """Return, for each rule, the number of weights and of parameters."""
    counts: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for weight in weights:
        counts[weight.rule] += 1
        numbers[weight.rule] += weight.numel
    return {rule: (counts[rule], numbers[rule]) for rule in sorted(counts)}
