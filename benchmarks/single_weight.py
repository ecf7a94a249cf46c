"""How much faster than the straightforward implementation is one weight of three tasks?

python benchmarks/single_weight.py --json benchmarks/results/single_weight.json
python benchmarks/single_weight.py --source bfloat16 \\
    --json benchmarks/results/single_weight_bfloat16.json
"""

from __future__ import annotations

import torch
from harness import (
    ACCURACY,
    add_source,
    compare,
    distance,
    finish,
    judge,
    parser,
    rates,
    reference,
    shown,
    straightforward,
    task_matrices,
)

from mergekit_stf.core import superpose

BOUNDS = {"4096x4096": 2.0, "4096x11008": 2.0}
"""How many times as fast as straightforward three tasks are to be on a CPU, by shape."""


def check(device: str, source: str) -> float:
    """Compare with the float64 reference, at a size where that takes seconds."""
    matrices = task_matrices((1024, 768), 3, device, seed=1)
    merged = superpose(matrices, source_dtype=getattr(torch, source)).M
    error = distance(merged, reference(matrices))
    assert error <= ACCURACY[source], error
    return error


def floor(shape: tuple[int, int], tasks: int, speed: dict[str, float]) -> dict[str, float]:
    """Count the products that are left when everything else is free, and their time.

    A task: the Gram matrix in float64 (m n²), its eigenvectors (about 9 n³ in float64), ``MV``
    (2 m n²), and its share of M (2 m n²); a pair of tasks: ``UᵀU`` and ``VᵀV`` (2 n² (m + n)).
    """
    m, n = max(shape), min(shape)
    double = tasks * (m * n * n + 9 * n**3)
    single = tasks * 4 * m * n * n + tasks * (tasks - 1) / 2 * 2 * n * n * (m + n)
    time = double / speed["float64 GFLOP/s"] / 1e9 + single / speed["float32 GFLOP/s"] / 1e9
    return {"float64 GFLOP": double / 1e9, "float32 GFLOP": single / 1e9, "seconds": time}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"])
    options.add_argument("--tasks", type=int, default=3)
    add_source(options)
    given = options.parse_args()
    source = getattr(torch, given.source)
    error = check(given.device, given.source)
    figures: dict[str, object] = {"error": error, "rates": rates(given.device)}
    print(f"error against float64 {figures['error']:.1e}; rates {figures['rates']}")
    for name in given.shapes:
        shape = tuple(int(side) for side in name.split("x"))
        matrices = task_matrices(shape, given.tasks, given.device)
        ours, rival = superpose(matrices, source_dtype=source).M, straightforward(matrices)
        apart = distance(ours, rival.double().cpu())
        assert apart <= 1e-2, apart  # the rival's float32 SVD is what is off
        del ours, rival
        timed = compare(
            lambda m=matrices: superpose(m, source_dtype=source),
            lambda m=matrices: straightforward(m),
            given.runs,
            given.device,
        )
        least = floor(shape, given.tasks, figures["rates"])
        figures[name] = timed | {"apart": apart, "floor": least}
        print(
            f"{name}, {given.tasks} tasks: ours {shown(timed['ours'])}, straightforward "
            f"{shown(timed['rival'])}, ratio {shown(timed['ratio'], 'x')}, floor "
            f"{least['seconds']:.2g} s, apart {apart:.1e}"
        )
        if name in BOUNDS and given.tasks == 3 and given.device == "cpu":
            what = f"{name}, times as fast as straightforward"
            judge(figures, what, timed["ratio"]["median"], "at least", BOUNDS[name])
    finish(given, figures)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
