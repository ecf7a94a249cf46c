"""What is checked before a merge starts, beyond the recipe: shapes, coverage, disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures.coverage import check_coverage, suspend_guard
from mergekit_stf.host.checkpoints.headers import header_if_any
from mergekit_stf.host.planning.classes import check_classes
from mergekit_stf.host.planning.config_differences import config_differences
from mergekit_stf.host.planning.planned import PlannedWeight, plan_weights
from mergekit_stf.host.recipe.parameters import filters
from mergekit_stf.host.store.store import Store

BLOCK = 4096
"""What each weight costs besides: a record of its merge, an entry's last block in the store."""


def preflight(
    config: MergeConfiguration,
    options: MergeOptions,
    folder: Path,
    store: Store,
    spools: bool = False,
) -> list[str]:
    """Check everything about a merge that can be known without reading a weight.

    Args:
        config: a recipe that passed `check_recipe`.
        options: the host's options.
        folder: an existing folder on the disk that will hold the output.
        store: the store that the merge will use.
        spools: whether finished weights may wait on the disk until they are written.

    Returns:
        What is suspicious but no reason to stop, one line each.

    Raises:
        STFError: a tensor is missing or of another shape, a weight would be lost, or the disk is
            too small.
    """
    check_classes(config, options)
    warnings = check_coverage(config, options)
    warnings += config_differences(config, options.trust_remote_code)
    if not methods.is_known(config.merge_method):
        return warnings
    with suspend_guard():
        weights = plan_weights(config, options)
    realigned = bool(
        config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings
    )
    problems = [problem for weight in weights for problem in _shape_problems(weight, realigned)]
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise STFError(f"{problems[0]}{more}")
    _check_disk(weights, folder, store, copies=2 if spools else 1)
    names = [weight.name for weight in weights]
    return [*warnings, *_memory_warnings(weights, options), *_idle_filters(config, names)]


def _shape_problems(weight: PlannedWeight, realigned: bool) -> Iterator[str]:
    """Compare with the base; where a vocabulary is realigned, one axis may differ."""
    expected = weight.header.shape
    for model in weight.models:
        header = header_if_any(weight.loads[model])
        if header is None or header.shape == expected:
            continue
        shape = header.shape
        axes = [axis for axis, (a, b) in enumerate(zip(shape, expected, strict=False)) if a != b]
        one = axes[0] if len(shape) == len(expected) and len(axes) == 1 else None
        if one is not None and realigned:
            continue
        if one is not None and one == weight.vocabulary_axis:
            yield (
                f"{weight.name}: {model} has a vocabulary of {shape[one]} tokens, the base one of "
                f"{expected[one]}; add «tokenizer: {{source: union}}» to the recipe to merge all "
                "tokens, or «tokenizer: {source: base}» to keep those of the base"
            )
        else:
            yield (
                f"{weight.name}: {model} has shape {shape}, the base has {expected}; "
                "only models of one architecture and size can be merged"
            )


def _check_disk(weights: list[PlannedWeight], folder: Path, store: Store, copies: int) -> None:
    output = copies * sum(weight.numel * weight.out_dtype.itemsize + BLOCK for weight in weights)
    matrices = [weight.stored_bytes for weight in weights if weight.stored_bytes]
    stored = min(sum(matrices) + BLOCK * len(matrices), store.size) - store.count_bytes()
    disks = {folder.stat().st_dev: (folder, output)}
    disk = store.folder.stat().st_dev
    place, already = disks.get(disk, (store.folder, 0))
    disks[disk] = place, already + max(stored, 0)
    for place, needed in disks.values():
        free = shutil.disk_usage(place).free
        if free < needed:
            raise STFError(
                f"{place}: {format_bytes(needed)} needed for the output and for resuming, "
                f"{format_bytes(free)} free; make room, or lower --store-size"
            )


def _matrix_bytes(weight: PlannedWeight) -> int:
    return weight.numel * max(weight.dtype.itemsize, torch.float32.itemsize)


def format_bytes(count: float) -> str:
    """Write a number of bytes with the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _memory_warnings(weights: list[PlannedWeight], options: MergeOptions) -> Iterator[str]:
    """Compare a rough need with what is free: the largest weight, and the shard being filled."""
    output = sum(weight.numel * weight.out_dtype.itemsize for weight in weights)
    tasks = max((len(weight.models) for weight in weights), default=0)
    largest = max((_matrix_bytes(weight) for weight in weights), default=0)
    needed = min(output, options.out_shard_size) + largest * (3 * tasks + 2)
    free = psutil.virtual_memory().available
    if free < needed:
        yield (
            f"about {format_bytes(needed)} of memory needed, {format_bytes(free)} free; "
            "--out-shard-size 1B lowers the need"
        )


def _idle_filters(config: MergeConfiguration, names: list[str]) -> Iterator[str]:
    for text in dict.fromkeys(filters(config.model_dump())):
        if text != "*" and not any(text in name for name in names):
            yield f"filter {text!r} matches no weight, so its value is never used"
