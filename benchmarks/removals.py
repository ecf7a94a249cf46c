"""What does each part that was removed from the engine cost, on the case that it was made for?

Whole processes of the engine before and after run in pairs, the first of a pair in turn. Each makes
the same task matrices, compares its answer with a float64 reference, and then times more merges.
Pools and shares of leftover tasks need all cores: leave OMP_NUM_THREADS unset.

git worktree add /tmp/before 0827f44
python benchmarks/removals.py --before /tmp/before --json benchmarks/results/removals.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import ACCURACY, distance, parser, peak_memory, shown, spread, task_matrices, write
from torch import Tensor

AFTER = Path(__file__).resolve().parent.parent
RANK_OF_ADAPTERS = 16
SMALL_SIDE = 96
"""Side with ``--tiny``."""


@dataclass(frozen=True)
class Case:
    """Task matrices for which something that was removed had been written.

    Attributes:
        removed: what.
        side: of each task matrix.
        tasks: how many there are.
        source: type of the checkpoints.
        low_rank: whether they are products of two factors.
        occupied: the fraction of rows and of columns that hold anything.
    """

    removed: str
    side: int
    tasks: int
    source: str = "float32"
    low_rank: bool = False
    occupied: float = 1.0

    @property
    def name(self) -> str:
        """A name for tables."""
        return f"{self.removed}, {self.tasks} of {self.side} x {self.side}, {self.source}"

    def matrices(self) -> list[Tensor]:
        """Make the task matrices."""
        made = task_matrices((self.side, self.side), self.tasks)
        if self.low_rank:
            made = [M[:, :RANK_OF_ADAPTERS] @ M[:RANK_OF_ADAPTERS] for M in made]
        full = int(self.occupied * self.side)
        for M in made:
            M[full:] = 0
            M[:, full:] = 0
        return made


CASES = (
    Case("half", 1024, 3, "bfloat16"),
    Case("half", 2048, 3, "bfloat16"),
    Case("sweeps", 512, 16),
    Case("sweeps", 512, 32),
    Case("low_rank probe", 2048, 3, low_rank=True),
    Case("round-robin", 1024, 3),
    Case("_occupied", 1024, 3, occupied=0.25),
    Case("pool", 768, 3),
    Case("pool", 768, 7),
)


def reference(matrices: Sequence[Tensor]) -> Tensor:
    """The right answer: SVDs in float64, and conjugate gradients until nothing is left to gain."""
    parts = []
    for M in matrices:
        U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
        k = int((s > 1e-6 * s[0]).sum())
        parts.append((U[:, :k], s[:k], Vh[:k]))
    sizes = [s.numel() for _, s, _ in parts]

    def assembled(alpha: Tensor) -> Tensor:
        pieces = zip(parts, alpha.split(sizes), strict=True)
        return sum((U * a) @ Vh for (U, _, Vh), a in pieces)

    def applied(alpha: Tensor) -> Tensor:
        M = assembled(alpha)
        return torch.cat([((Vh @ M.mT) * U.mT).sum(dim=1) for U, _, Vh in parts])

    s = torch.cat([s for _, s, _ in parts])
    alpha, residual = torch.zeros_like(s), s.clone()
    direction, square = residual.clone(), float(s @ s)
    least = 1e-24 * square
    while square > least:
        image = applied(direction)
        step = square / float(direction @ image)
        alpha += step * direction
        residual -= step * image
        before, square = square, float(residual @ residual)
        direction = residual + square / before * direction
    return assembled(alpha)


def work(case: Case, expected: Path, repeats: int, root: Path) -> dict[str, Any]:
    """Merge in this process, check the answer, and time more merges."""
    import mergekit_stf
    from mergekit_stf.core import superpose

    if root.resolve() not in Path(mergekit_stf.__file__).resolve().parents:
        sys.exit(f"{mergekit_stf.__file__} is not of {root}")
    matrices, source = case.matrices(), getattr(torch, case.source)
    error = distance(superpose(matrices, source_dtype=source).M, torch.load(expected))
    if error > ACCURACY[case.source]:
        sys.exit(f"{case.name}: error {error:.1e}")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        superpose(matrices, source_dtype=source)
        times.append(time.perf_counter() - start)
    return {"error": error, "seconds": times, "peak": peak_memory()}


def process(case: int, given: argparse.Namespace, expected: Path, root: Path) -> dict[str, Any]:
    """Run ``work`` in a process of its own that imports the engine of one checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(case)]
    command += ["--expected", str(expected), "--root", str(root), "--repeats", str(given.repeats)]
    command += ["--tiny"] if given.tiny else []
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout) | {"process": time.perf_counter() - start}


def pairs(index: int, case: Case, given: argparse.Namespace, expected: Path) -> dict[str, Any]:
    """Run both engines in turn and return their times, memory, errors and the ratios of pairs."""
    roots = {"before": given.before, "after": AFTER}
    found: dict[str, list[dict[str, Any]]] = {which: [] for which in roots}
    for run in range(given.runs):
        for which in sorted(roots, reverse=run % 2 == 0):
            found[which].append(process(index, given, expected, roots[which]))
    seconds = {which: [min(run["seconds"]) for run in runs] for which, runs in found.items()}
    ratios = [a / b for a, b in zip(seconds["after"], seconds["before"], strict=True)]
    return {
        "removed": case.removed,
        **{
            which: {
                "seconds": spread(seconds[which]),
                "process": spread([run["process"] for run in runs]),
                "peak": max(run["peak"] for run in runs),
                "error": max(run["error"] for run in runs),
            }
            for which, runs in found.items()
        },
        "ratio": spread(ratios),
    }


def cases(tiny: bool) -> list[Case]:
    """Return the cases, at a side where they take no time if so wanted."""
    if not tiny:
        return list(CASES)
    return [
        Case(c.removed, SMALL_SIDE, min(c.tasks, 4), c.source, c.low_rank, c.occupied)
        for c in CASES
    ]


def commit_of(root: Path) -> str:
    """Return the commit that a checkout is at, and whether it has been changed since."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--before", type=Path, help="a checkout of the engine before")
    options.add_argument("--repeats", type=int, default=3, help="merges a process; the best counts")
    options.add_argument("--only", help="what was removed, to measure that alone")
    options.add_argument("--tiny", action="store_true", help="small matrices, to try the script")
    options.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options.add_argument("--expected", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    chosen = cases(given.tiny)
    if given.child is not None:
        case = chosen[given.child]
        print(json.dumps(work(case, given.expected, given.repeats, given.root)))
        return
    if given.before is None:
        options.error("--before is needed")
    commits = {"before": commit_of(given.before), "after": commit_of(AFTER)}
    figures: dict[str, Any] = {"commits": commits, "tiny": given.tiny, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.pt"
        for index, case in enumerate(chosen):
            if given.only not in (None, case.removed):
                continue
            torch.save(reference(case.matrices()), expected)
            found = figures["cases"][case.name] = pairs(index, case, given, expected)
            before, after = (shown(found[which]["seconds"]) for which in ("before", "after"))
            ratio = shown(found["ratio"], "x")
            print(f"{case.name}: before {before}, after {after}, ratio {ratio}", flush=True)
            write(given.json, figures)


if __name__ == "__main__":
    main()
