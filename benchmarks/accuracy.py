"""How far is each route from the exact answer, and is that enough for half-precision checkpoints?

For float32 checkpoints a route must stay within 1e-5 of the float64 reference. For half-precision
ones it may be the default if its error is below a tenth of the change that rounding the inputs to
that type causes: the same tuned matrices, once as they are and once rounded, merged in float64.
``gram_float32`` passes for bfloat16 and not in every case for float16. The row ``bfloat16`` is what
such checkpoints get.

    python benchmarks/accuracy.py --json benchmarks/results/accuracy.json
"""

from __future__ import annotations

import torch
from harness import distance, parser, reference, spread, task_matrices, write
from torch import Tensor

from mergekit_stf.core import superpose, trim
from mergekit_stf.core.features.decompose import ROUTES

SHAPES = ["256x256", "512x384", "768x768"]


def spectra(shape: tuple[int, int], seed: int, density: float) -> dict[str, list[Tensor]]:
    """Return three task matrices of each kind: flat (Gaussian), realistic and steep decay."""
    kinds = {"flat": 0.0, "decaying": 0.5, "steep": 1.5}
    return {
        kind: [
            trim(0.01 * M / M.std(), density) for M in task_matrices(shape, 3, seed=seed, decay=d)
        ]
        for kind, d in kinds.items()
    }


def rounding(matrices: list[Tensor], dtype: torch.dtype, seed: int) -> float:
    """Return the change of M when base, N(0, 0.02²), and tuned weights are rounded."""
    base = 0.02 * torch.randn(matrices[0].shape, generator=torch.Generator().manual_seed(seed))
    base = base.to(dtype).float()
    rounded = [(base + 0.1 * M).to(dtype).float() - base for M in matrices]
    return distance(reference(rounded), reference([0.1 * M for M in matrices]))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.2])
    options.add_argument("--shapes", nargs="+", default=SHAPES)
    given = options.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    errors: dict[str, list[float]] = {route: [] for route in (*ROUTES, "bfloat16")}
    shares: dict[str, list[float]] = {"bfloat16": [], "float16": []}
    for seed, shape in enumerate(shapes * given.runs):
        for density in given.densities:
            for matrices in spectra(shape, seed, density).values():
                expected = reference(matrices)
                found = {r: distance(superpose(matrices, route=r).M, expected) for r in ROUTES}
                rough = superpose(matrices, source_dtype=torch.bfloat16)
                found["bfloat16"] = distance(rough.M, expected)
                for route, error in found.items():
                    errors[route].append(error)
                for dtype, route in (("bfloat16", "bfloat16"), ("float16", "gram_float32")):
                    moved = rounding(matrices, getattr(torch, dtype), seed)
                    shares[dtype].append(found[route] / moved)
    figures = {
        "error": {route: spread(values) for route, values in errors.items()},
        "error over the change by rounding": {k: spread(v) for k, v in shares.items()},
    }
    for route, values in figures["error"].items():
        print(f"{route}: error {values['median']:.1e} ({values['min']:.1e} to {values['max']:.1e})")
    for dtype, values in shares.items():
        print(f"{dtype}: an error of at most {max(values):.1e} of what rounding changes")
    assert max(errors["gram_float64"]) <= 1e-5
    assert max(shares["bfloat16"]) <= 0.1
    write(given.json, figures)


if __name__ == "__main__":
    main()
