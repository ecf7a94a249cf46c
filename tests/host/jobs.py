"""Jobs of small weights whose differences to the base are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_stf.core.methods import Kind
from mergekit_stf.host.merging.job import Task, WeightJob

STF = {"rank": 1.0, "ridge": "auto"}


def job_of(
    matrices: Sequence[Tensor],
    *,
    models: str = "abcdefgh",
    weight: float = 1.0,
    density: float = 1.0,
    **changes: Any,
) -> WeightJob:
    """Return the job of a linear map over a base of zeros, by ``stf`` as it is by default."""
    given = {
        "name": "layer.0.weight",
        "kind": Kind.LINEAR,
        "base": torch.zeros_like(matrices[0]),
        "tasks": tuple(
            Task(model, tuned=M, weight=weight, density=density)
            for model, M in zip(models, matrices, strict=False)
        ),
        "method": "stf",
        "options": STF,
    }
    return WeightJob(**(given | changes))


def three(seed: int = 0) -> list[Tensor]:
    """Return three task matrices, the second of which shares half of the first."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randn(24, 16, generator=generator) for _ in range(3))
    return [first, second + first / 2, third]


def contradicting() -> list[Tensor]:
    """Return two task matrices that ask for contradicting responses."""
    A, noise, _ = three()
    return [A, 1.1 * A + 1e-4 * noise]
