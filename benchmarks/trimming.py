"""What share of a weight's merge does trimming take?

python benchmarks/trimming.py --json benchmarks/results/trimming.json
"""

from __future__ import annotations

import torch
from harness import finish, judge, parser, seconds, shown, spread, task_matrices

from mergekit_stf.core import superpose, trim

SIZES, SHARE = (768, 1024, 2048), 0.05
"""Sides of weights of whose merge trimming is to be at most this share."""


def sorted_away(x: torch.Tensor, density: float) -> torch.Tensor:
    """Trim by a stable sort: the rival, and the right answer."""
    order = x.flatten().abs().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(x).flatten()
    k = max(1, int(density * x.numel()))
    kept[order[:k]] = x.flatten()[order[:k]]
    return kept.reshape(x.shape)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument("--density", type=float, default=0.2)
    given = options.parse_args()
    figures: dict[str, object] = {}
    for size in given.sizes:
        matrices = task_matrices((size, size), 3, given.device)
        for M in matrices:
            assert torch.equal(trim(M, given.density), sorted_away(M, given.density))
        trimming, sorting, merging = [], [], []
        for _ in range(given.runs):
            trimming.append(
                seconds(lambda m=matrices: [trim(M, given.density) for M in m], given.device)
            )
            sorting.append(
                seconds(lambda m=matrices: [sorted_away(M, given.density) for M in m], given.device)
            )
            trimmed = [trim(M, given.density) for M in matrices]
            merging.append(
                seconds(lambda t=trimmed: superpose(t, source_dtype=torch.bfloat16), given.device)
            )
        share = spread([t / (t + s) for t, s in zip(trimming, merging, strict=True)])
        figures[str(size)] = {"trim": spread(trimming), "sort": spread(sorting), "share": share}
        print(
            f"{size}: trimming {shown(spread(trimming))}, a sort {shown(spread(sorting))}, share "
            f"of the merge {share['median']:.1%} ({share['min']:.1%} to {share['max']:.1%})"
        )
        if size in SIZES:
            judge(figures, f"share of trimming at {size}", share["median"], "at most", SHARE)
    finish(given, figures)


if __name__ == "__main__":
    main()
