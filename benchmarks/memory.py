"""How much memory does a merge take above its inputs?

The bound is three times the float32 size of the task matrices plus 1 GB. Task matrices are made
one by one while the merge asks for them, as the method does, so that they count as well. Each
shape runs in a process of its own. On a card the allocator's peak counts, on the CPU the process's
peak above that of the same process with a tiny merge.

    python benchmarks/memory.py --json benchmarks/results/memory.json
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch
from harness import add_source, finish, judge, parser, peak_memory
from torch import Tensor

from mergekit_stf.core import TaskMatrices, methods, superpose
from mergekit_stf.core.precision import full_precision

SHAPES = ["4096x4096x3", "8192x8192x3", "11008x4096x3", "28672x8192x3", "2048x2048x8", "512x512x64"]


def made(shape: tuple[int, int], tasks: int, device: str) -> Iterator[Tensor]:
    """Yield Gaussian task matrices whose columns fade."""
    for task in range(tasks):
        generator = torch.Generator(device).manual_seed(task)
        M = torch.randn(shape, device=device, generator=generator)
        yield M.mul_((1 + torch.arange(shape[1], device=device) / 8) ** -0.5)


def once(name: str, device: str, route: str, source: str) -> None:
    """Merge one stack of task matrices and print the peak and the routes."""
    m, n, tasks = (int(side) for side in name.split("x"))
    superpose(made((32, 32), 3, device))
    dtype = getattr(torch, source)
    options = {"rank": 1.0, "ridge": "auto", "route": route}
    given = TaskMatrices(
        read=lambda: made((m, n), tasks, device),
        shape=(m, n),
        count=tasks,
        device=torch.device(device),
        source_dtype=dtype,
    )
    with full_precision(), torch.no_grad():
        record = methods.get("stf").merge(given, options).record
    assert record.converged
    on_card = device.startswith("cuda")
    used = torch.cuda.max_memory_allocated() if on_card else peak_memory()
    print(used, *set(record.routes))


def peak(name: str, device: str, route: str, source: str) -> tuple[int, list[str]]:
    """Run one shape in its own process and return what ``once`` prints, the peak in bytes."""
    options = ["--once", name, "--device", device, "--route", route, "--source", source]
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used, *routes = done.stdout.split()
    return int(used), routes


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=SHAPES)
    options.add_argument("--route", default="auto")
    options.add_argument("--once")
    add_source(options)
    given = options.parse_args()
    if given.once:
        once(given.once, given.device, given.route, given.source)
        return
    idle, *_ = peak("32x32x3", given.device, "auto", given.source)
    figures: dict[str, object] = {"idle": idle, "source": given.source}
    for name in given.shapes:
        m, n, tasks = (int(side) for side in name.split("x"))
        size = 4 * m * n * tasks
        highest, routes = peak(name, given.device, given.route, given.source)
        assert given.route in ("auto", *routes), routes
        limit, used = 3 * size + 10**9, highest - idle
        figures[name] = {
            "routes": routes,
            "task matrices": size,
            "used": used,
            "bound": limit,
        }
        print(f"{name}: task matrices of {size / 1e9:.2f} GB, {', '.join(routes)}")
        judge(figures, f"{name}, GB above an idle process", used / 1e9, "at most", limit / 1e9)
    finish(given, figures)


if __name__ == "__main__":
    main()
