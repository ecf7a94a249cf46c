"""How long do all the matrices of a model take, and how much longer with the straightforward way?

Ours merges every matrix; the rival is timed beside it on a few of each shape, in turn.

    python benchmarks/model_shapes.py t5-base --json benchmarks/results/t5_base.json
    python benchmarks/model_shapes.py t5-base --source bfloat16 \\
        --json benchmarks/results/t5_base_bfloat16.json
    python benchmarks/model_shapes.py llama-2-7b --device cuda --rival 1 \\
        --json benchmarks/results/llama_2_7b_cuda.json
    python benchmarks/model_shapes.py llama-2-7b --device cuda --method wudi --rival 0
"""

from __future__ import annotations

import argparse
import statistics
import time
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
    reference,
    seconds,
    shown,
    spread,
    straightforward,
    synchronize,
    task_matrices,
)

from mergekit_stf.core import Merged, TaskMatrices, methods, superpose

MODELS: dict[str, tuple[int, list[tuple[tuple[int, int], int]]]] = {
    "t5-base": (7, [((768, 768), 144), ((3072, 768), 24), ((768, 3072), 24)]),
    "llama-2-7b": (3, [((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32)]),
    "tiny": (3, [((64, 64), 4), ((96, 64), 2)]),
}
"""Tasks, and the shapes with their number: 192 matrices of T5-base, 224 of Llama-2-7B."""

FASTER = 3.0
"""How many times as fast as straightforward T5-base is to be on a CPU."""

SECONDS = {1.0: 100.0, 0.2: 40.0}
"""Time that Llama-2-7B may take on an H200, by ``rank``."""

LIMITS = {"gram_refined": 1e-4, "gram_float32": 1e-3, "svd": 1e-3}
"""Error that a forced route may have."""

OTHERS = 1e-5
"""Error that another method may have against itself in float64."""

TRUNCATED = 1e-3
"""Error that leading features may have."""

WUDI_SECONDS = 15.0
"""Time that `wudi` may take for Llama-2-7B on an H100 or H200."""

SEEDS = 8
"""Different stacks of task matrices of each shape, taken in turn."""


def limit_of(given: argparse.Namespace) -> float:
    """Return the error that is allowed."""
    if given.rank < 1:
        return TRUNCATED
    return max(ACCURACY[given.source], LIMITS.get(given.route, 0.0))


def by_method(matrices: list[torch.Tensor], name: str) -> Merged:
    """Merge by a method at its default."""
    method = methods.get(name)
    return method.merge(
        TaskMatrices.of(matrices), {option.name: option.default for option in method.options}
    )


def check(given: argparse.Namespace) -> float:
    """Compare with the float64 reference, at a size where that takes seconds.

    The reference of another method than stf is its own answer in float64 on the CPU, which the
    tests compare with an oracle.
    """
    matrices = task_matrices((640, 512), 3, given.device, seed=1)
    if given.method != "stf":
        right = by_method([M.double().cpu() for M in matrices], given.method).M
        error = distance(by_method(matrices, given.method).M, right)
        assert error <= OTHERS, error
        return error
    kept = None if given.rank == 1 else int(given.rank * 512)
    source = getattr(torch, given.source)
    found = superpose(matrices, route=given.route, rank=given.rank, source_dtype=source)
    error = distance(found.M, reference(matrices, kept))
    assert error <= limit_of(given), error
    return error


def bound(given: argparse.Namespace, figures: dict[str, object]) -> None:
    """Judge the figures for which a bound is set."""
    total, rivals = (
        figures[name]
        for name in ("seconds for all matrices", "straightforward, seconds for all matrices")
    )
    if given.method == "wudi" and given.model == "llama-2-7b" and given.device != "cpu":
        judge(figures, "seconds for all matrices", total, "at most", WUDI_SECONDS)
    if given.route != "auto" or given.method != "stf":
        return
    if given.model == "t5-base" and given.device == "cpu" and given.rank == 1 and rivals:
        judge(figures, "times as fast as straightforward", rivals / total, "at least", FASTER)
    if given.model == "llama-2-7b" and given.device != "cpu" and given.rank in SECONDS:
        judge(figures, "seconds for all matrices", total, "at most", SECONDS[given.rank])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model", choices=MODELS)
    options.add_argument("--method", default="stf", help="ours; the rival is of stf alone")
    options.add_argument("--rank", type=float, default=1.0)
    options.add_argument("--route", default="auto")
    add_source(options)
    options.add_argument("--fraction", type=float, default=1.0, help="of each shape's matrices")
    options.add_argument("--rival", type=int, default=2, help="matrices of each shape, 0 for none")
    options.add_argument(
        "--beside", action="store_true", help="check each stack against the default route"
    )
    given = options.parse_args()
    tasks, shapes = MODELS[given.model]
    limit = limit_of(given)
    merge = partial(superpose, rank=given.rank, source_dtype=getattr(torch, given.source))
    if given.method != "stf":
        if given.rank != 1 or given.route != "auto" or given.beside or given.rival:
            options.error("--method takes neither --rank nor --route nor --beside; give --rival 0")
        merge = partial(by_method, name=given.method)
    figures: dict[str, object] = {"error": check(given), "source": given.source}
    print(f"error against float64: {figures['error']:.1e}")
    total, rivals = 0.0, 0.0
    for shape, count in shapes:
        number = max(1, round(given.fraction * count))
        ours, rival, apart = [], [], []
        for index in range(number):
            matrices = task_matrices(shape, tasks, given.device, seed=index % SEEDS)
            start = time.perf_counter()
            M = merge(matrices).M if given.method != "stf" else merge(matrices, route=given.route).M
            synchronize(given.device)
            ours.append(time.perf_counter() - start)
            if index < given.rival:
                rival.append(seconds(lambda m=matrices: straightforward(m), given.device))
            if given.beside and index < SEEDS:
                default = merge(matrices).M
                apart.append(distance(M, default.double().cpu()))
                assert apart[-1] <= limit, apart[-1]
        total += sum(ours) * count / number
        entry = {"matrices": number, "of": count, "ours": spread(ours)}
        line = f"{shape}: {number} of {count}, ours {shown(entry['ours'])}"
        if rival:
            ratio = spread([b / a for a, b in zip(ours, rival, strict=False)])
            rivals += entry["of"] * statistics.median(rival)
            entry |= {"rival": spread(rival), "ratio": ratio}
            line += f", straightforward {shown(entry['rival'])}, ratio {shown(ratio, 'x')}"
        if apart:
            entry["apart"] = spread(apart)
            line += f", from the default route {shown(entry['apart'], '')}"
        figures["x".join(map(str, shape))] = entry
        print(line, flush=True)
    device_peak = torch.cuda.max_memory_allocated() if given.device.startswith("cuda") else None
    figures |= {
        "tasks": tasks,
        "method": given.method,
        "rank": given.rank,
        "route": given.route,
        "seconds for all matrices": total,
        "straightforward, seconds for all matrices": rivals or None,
        "peak bytes": peak_memory(),
        "peak device bytes": device_peak,
    }
    print(f"{given.model}, {tasks} tasks, all matrices: {total:.1f} s")
    if rivals:
        print(f"straightforward: {rivals:.1f} s, {rivals / total:.2f} x as long")
    bound(given, figures)
    finish(given, figures)


if __name__ == "__main__":
    main()
