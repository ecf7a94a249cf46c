"""How far whole models are from their base, for methods that weigh one model against another.

All models are read once, weight by weight as mergekit plans them, before the first one is merged.
What was read is remembered by the files' sizes and times, so that every weight of a merge, and
every merge of a sweep, gets the same numbers without another look.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.methods import Method
from mergekit_stf.core.precision import CHUNK
from mergekit_stf.host.architectures.coverage import recipe_of_group, suspend_guard
from mergekit_stf.host.merging.finite import check_finite

LOG = logging.getLogger(__name__)

Read = Callable[[ModelReference], Tensor | None]
"""Reads one weight of a model, None where it has none."""


def measure_if_asked(
    method: Method, base: Hashable, models: Sequence[Hashable]
) -> tuple[float | None, ...]:
    """Return the squared distance of each model to the base, where a method asks for it.

    Raises:
        STFError: as ``measure_distances``.
    """
    if not method.whole_models:
        return (None,) * len(models)
    return measure_distances(method, base, models)


def measure_distances(
    method: Method, base: Hashable, models: Sequence[Hashable]
) -> tuple[float, ...]:
    """Return ``|θ_i - θ_0|²`` of each model, over all floating-point weights, summed in float64.

    A weight counts once, whatever ties it to others. One that a model has in another shape than the
    base, as where its vocabulary differs, is left out with a warning.

    Args:
        method: under whose name the host plans the weights.
        base: the base model.
        models: the tuned models.

    Raises:
        STFError: they are no models of the host, as where it was given bare tensors; they are not
            of one architecture; or an entry is not finite.
    """
    references = [model for model in (base, *models) if isinstance(model, ModelReference)]
    if len(references) <= len(models):
        raise STFError(
            f"{method.name} needs whole models, and got tensors without the checkpoints that they "
            "are from; merge with mergekit-yaml or mergekit-stf"
        )
    first, *others = references
    known = _measured(
        method.name,
        first,
        tuple(sorted(set(others), key=str)),
        tuple(identity for model in references for identity in _files(model)),
        torch.get_num_threads(),
    )
    return tuple(known[model] for model in others)


def squared_length(x: Tensor) -> float:
    """Return the sum of squares of a tensor's entries, in float64."""
    parts = torch.split(x.reshape(-1), CHUNK)
    return math.fsum(float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in parts)


@lru_cache(maxsize=16)
def _measured(
    method: str,
    base: ModelReference,
    models: tuple[ModelReference, ...],
    files: tuple[tuple[str, int, int], ...],
    threads: int,
) -> dict[ModelReference, float]:
    """Read all models; ``files`` and ``threads`` are what else the numbers depend on."""
    squares: dict[ModelReference, list[float]] = {model: [] for model in models}
    raw = os.path.isfile(base.model.path)
    for name, read in _raw(base, models) if raw else _planned(method, base, models):
        P0 = read(base)
        for model in models:
            squares[model].append(_measure_weight(name, P0, read(model), str(model)))
    return {model: math.fsum(found) for model, found in squares.items()}


def _measure_weight(name: str, P0: Tensor | None, P: Tensor | None, model: str) -> float:
    if P0 is None or P is None or not P.is_floating_point():
        return 0.0
    if P.shape != P0.shape:
        LOG.warning(
            "%s has shape %s in %s and %s in the base; it is left out of the model's length",
            name,
            tuple(P.shape),
            model,
            tuple(P0.shape),
        )
        return 0.0
    compute = torch.promote_types(P0.dtype, torch.float32)
    square = squared_length(P.to(compute) - P0.to(compute))
    if not math.isfinite(square):
        check_finite(name, [("base_model", P0), (model, P)])
    return square


def _planned(
    method: str, base: ModelReference, models: Sequence[ModelReference]
) -> Iterator[tuple[str, Read]]:
    # Imported here, for our registration may follow an import of ``mergekit.plan`` half-way.
    from mergekit_stf.host.planning.planned import plan_weights

    with suspend_guard():
        weights = plan_weights(*recipe_of_group(method, base, models))
    yield from ((weight.name, weight.load) for weight in weights)


def _raw(base: ModelReference, models: Sequence[ModelReference]) -> Iterator[tuple[str, Read]]:
    """Yield the tensors of bare files, as ``mergekit-pytorch`` merges them by their names."""
    loaders = {
        model: LazyTensorLoader(ShardedTensorIndex.from_file(model.model.path))
        for model in (base, *models)
    }

    def read(name: str, model: ModelReference) -> Tensor | None:
        found: Tensor | None = loaders[model].get_tensor(name, raise_on_missing=False)
        return found

    for name in sorted(loaders[base].index.tensor_paths):
        yield name, partial(read, name)


def _files(model: ModelReference) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of change of the files that hold a model."""
    path = Path(model.model.path)
    index = None if path.is_file() else LoaderCache().get(model).index
    names = [] if index is None else sorted(set(index.tensor_paths.values()))
    for file in [path] if index is None else [Path(index.base_path) / name for name in names]:
        stat = file.stat()
        yield str(file), stat.st_size, stat.st_mtime_ns
