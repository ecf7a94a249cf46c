"""Print how far the routes are from the oracle over seeds, shapes and gaps, as JSON.

A process of its own: MKL reads ``MKL_CBWR``, which chooses its kernels, when it is first called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from mergekit_stf.core import superpose, trim
from mergekit_stf.core.features.decompose import ROUTES
from tests.core.cases import BOUND, distance, expected, with_close_runs, with_random_gaps

GAPS = (1e-6, 3e-6, 1e-5, 1e-4)
CLOSE = {"gram_refined": 1e-5, "gram_float64": 1e-6}
EVERYWHERE = {"gram_refined": 3e-5, "gram_float64": 1e-6}


def cases() -> Iterator[tuple[str, list[Tensor], dict[str, float]]]:
    """Yield names, task matrices, and the error that each route may have."""
    for shape, gap, seed in product([(256, 256), (320, 256), (400, 400)], GAPS, (0, 2)):
        inputs = [with_close_runs(seed + i, gap, shape) for i in range(2)]
        yield f"{shape}, gap {gap}, seed {seed}", inputs, CLOSE
    for lowest in (-7, -4.5):
        inputs = [with_random_gaps(seed, lowest) for seed in range(3)]
        yield f"gaps from 1e{lowest}", inputs, EVERYWHERE
    for shape, density, seed in product([(96, 96), (128, 80)], (1.0, 0.2), range(4)):
        generator = torch.Generator().manual_seed(seed)
        inputs = [trim(torch.randn(shape, generator=generator), density) for _ in range(3)]
        yield f"{shape}, density {density}, seed {seed}", inputs, {r: BOUND[r] for r in ROUTES}


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for name, inputs, bounds in cases():
        exact = expected(inputs)
        for route, bound in bounds.items():
            found.append((name, route, distance(superpose(inputs, route=route).M, exact), bound))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
