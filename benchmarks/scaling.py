"""How do time and memory grow with the number of models?

Memory is the peak of a process of its own above an idle one, on a card that of the allocator above
the task matrices.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json
    python benchmarks/scaling.py --source bfloat16 --json benchmarks/results/scaling_bfloat16.json
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from harness import (
    ACCURACY,
    add_source,
    distance,
    finish,
    judge,
    parser,
    peak_memory,
    peak_of,
    reference,
    seconds,
    shown,
    spread,
    straightforward,
    task_matrices,
)
from torch import Tensor

from mergekit_stf.core import superpose

LIMITS = ACCURACY | {"bfloat16": 2e-3}
"""Error allowed for sixteen models, whose M rounding to bfloat16 changes by 0.2."""

SIDE, RATIO = 512, 20.0
"""Side of the weight of which 64 models are to take at most so many times the time of 4."""


def peak(tasks: int, size: int, source: str) -> int:
    """Return the peak of a process that merges so many matrices on the CPU."""
    options = ["--once", str(tasks), "--size", str(size), "--source", source]
    return peak_of([sys.executable, __file__, *options])[1]


def peak_on_card(matrices: list[Tensor], source: torch.dtype) -> int:
    """Return the bytes that a merge takes beside its matrices on their card."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    superpose(matrices, source_dtype=source)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, default=SIDE)
    options.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    options.add_argument("--rival-up-to", type=int, default=8)
    add_source(options)
    options.add_argument("--once", type=int, help="merge this many matrices and end")
    given = options.parse_args()
    shape = (given.size, given.size)
    source = getattr(torch, given.source)
    merge = partial(superpose, source_dtype=source)
    if given.once:
        merge(task_matrices(shape, given.once, given.device))
        return
    small = task_matrices((288, 256), 16, given.device)
    error = distance(merge(small).M, reference(small))
    assert error <= LIMITS[given.source], error
    figures: dict[str, object] = {"error": error, "size": given.size, "source": given.source}
    on_card = given.device.startswith("cuda")
    idle = 0 if on_card else peak(1, 64, given.source)
    for tasks in given.tasks:
        matrices = task_matrices(shape, tasks, given.device)
        record = merge(matrices).record
        assert record.converged
        ours = spread(
            [seconds(lambda m=matrices: merge(m), given.device) for _ in range(given.runs)]
        )
        used = (
            peak_on_card(matrices, source)
            if on_card
            else peak(tasks, given.size, given.source) - idle
        )
        entry = {
            "ours": ours,
            "steps": record.iterations,
            "bytes": used,
        }
        line = f"T = {tasks}: {shown(ours)}, {record.iterations} steps, "
        line += f"{entry['bytes'] / 2**20:.0f} MiB"
        if tasks <= given.rival_up_to:
            entry["rival"] = spread([seconds(lambda m=matrices: straightforward(m), given.device)])
            line += f", straightforward {shown(entry['rival'])}"
        figures[str(tasks)] = entry
        print(line, flush=True)
    if {4, 64} <= set(given.tasks):
        figures["64 to 4"] = figures["64"]["ours"]["median"] / figures["4"]["ours"]["median"]
        if given.size == SIDE:
            judge(figures, "time of T = 64 over T = 4", figures["64 to 4"], "at most", RATIO)
            growth = figures["64"]["bytes"] / figures["4"]["bytes"]
            judge(figures, "memory of T = 64 over T = 4", growth, "at most", 64 / 4)
    figures["peak of the benchmark"] = peak_memory()
    finish(given, figures)


if __name__ == "__main__":
    main()
