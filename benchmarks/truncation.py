"""What does ``rank`` save, and what does it cost in accuracy?

The error is the one against the float64 reference that keeps the same number of features.

    python benchmarks/truncation.py --json benchmarks/results/truncation.json
"""

from __future__ import annotations

from harness import (
    distance,
    finish,
    judge,
    parser,
    reference,
    seconds,
    shown,
    spread,
    task_matrices,
)

from mergekit_stf.core import superpose

SIDE, RANK, FASTER = 4096, 0.2, 5.0
"""The weight, and the rank at which it is to be so many times as fast as the exact way."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, default=SIDE)
    options.add_argument("--error-size", type=int, default=1024)
    options.add_argument("--ranks", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5])
    given = options.parse_args()
    small = task_matrices((given.error_size,) * 2, 3, given.device)
    large = task_matrices((given.size,) * 2, 3, given.device)
    exact = [seconds(lambda: superpose(large), given.device) for _ in range(given.runs)]
    figures: dict[str, object] = {"size": given.size, "exact": spread(exact)}
    print(f"exact: {shown(figures['exact'])}")
    for rank in given.ranks:
        result = superpose(small, rank=rank)
        error = distance(result.M, reference(small, int(rank * given.error_size)))
        assert error <= 1e-3, error
        route = superpose(large, rank=rank).record.routes[0]
        times = [
            seconds(lambda r=rank: superpose(large, rank=r), given.device)
            for _ in range(given.runs)
        ]
        ratio = spread([e / t for e, t in zip(exact, times, strict=True)])
        figures[str(rank)] = {"ours": spread(times), "ratio": ratio, "error": error, "route": route}
        print(
            f"rank {rank}: {shown(figures[str(rank)]['ours'])} by {route}, {shown(ratio, 'x')} "
            f"faster, error {error:.1e} at {given.error_size}",
            flush=True,
        )
        if (given.size, rank, given.device) == (SIDE, RANK, "cpu"):
            what = f"rank {rank}, times as fast as exact"
            judge(figures, what, ratio["median"], "at least", FASTER)
    finish(given, figures)


if __name__ == "__main__":
    main()
