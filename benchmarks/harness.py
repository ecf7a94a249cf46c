"""What the benchmarks share: the rival, synthetic task matrices, timing, and the JSON they write.

Every benchmark checks the answer before it prints a time, times rivals in turn within one run, and
prints medians with their range. ``--json FILE`` keeps the figures with the machine and versions.
Where a bound is set on a figure, at the size that it is meant for, a benchmark that misses it ends
with status 1, its figures written all the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(status)
"""

RESULTS = Path(__file__).parent / "results"

ACCURACY = {"float32": 1e-5, "bfloat16": 1e-3}
"""Error of M that is allowed, by type of the checkpoints; ``accuracy.py`` has what bfloat16's own
rounding hides."""


def straightforward(matrices: Sequence[Tensor]) -> Tensor:
    """The paper's Algorithm 1 as it stands: SVDs, the full r×r system, one dense solve."""
    U, s, Vh = zip(*(torch.linalg.svd(M, full_matrices=False) for M in matrices), strict=True)
    U, s, V = torch.cat(U, dim=1), torch.cat(s), torch.cat(Vh).mT
    alpha = torch.linalg.solve((U.mT @ U) * (V.mT @ V), s)
    return (U * alpha) @ V.mT


def reference(matrices: Sequence[Tensor], rank: int | None = None) -> Tensor:
    """The same in float64 on the CPU, with the numerical rank; the right answer."""
    parts = []
    for M in matrices:
        U, s, Vh = torch.linalg.svd(M.double().cpu(), full_matrices=False)
        k = min(rank or s.numel(), int((s > 1e-6 * s[0]).sum()))
        parts.append((U[:, :k], s[:k], Vh[:k]))
    U, s, Vh = (
        torch.cat(x, dim=d) for x, d in zip(zip(*parts, strict=True), (1, 0, 0), strict=True)
    )
    G = (U.mT @ U) * (Vh @ Vh.mT)
    alpha = torch.cholesky_solve(s.unsqueeze(1), torch.linalg.cholesky(G)).squeeze(1)
    return (U * alpha) @ Vh


def references() -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    """Return the right answer of each method that is timed, in float64 on the CPU.

    Those besides ``stf`` are the oracles of the tests, which share no code with the engine.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.subspace_oracles import iso_c, tsv_m
    from tests.wudi_oracle import wudi

    def of(oracle: Callable[..., Any]) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda matrices: torch.from_numpy(oracle([M.double().numpy() for M in matrices]))

    return {"stf": reference, "wudi": of(wudi), "tsv_m": of(tsv_m), "iso_c": of(iso_c)}


def distance(M: Tensor, expected: Tensor) -> float:
    """Return ``|M - expected| / |expected|``."""
    return float(torch.linalg.norm(M.double().cpu() - expected) / torch.linalg.norm(expected))


def task_matrices(
    shape: tuple[int, int], tasks: int, device: str = "cpu", seed: int = 0, decay: float = 0.5
) -> list[Tensor]:
    """Make task matrices with a decaying spectrum, ``s_k ~ (1 + k/8)^-decay``, in random bases.

    Products of Gaussian factors stand for the random bases: ``A diag(s) B``, which needs no QR.
    """
    m, n = shape
    k = min(m, n)
    matrices = []
    for task in range(tasks):
        generator = torch.Generator(device).manual_seed(seed * 1000 + task)
        s = (1 + torch.arange(k, device=device) / 8) ** -decay
        A = torch.randn(m, k, device=device, generator=generator)
        B = torch.randn(k, n, device=device, generator=generator)
        matrices.append((A * s) @ B / k)
    return matrices


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the wall time of one call, device work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def compare(
    ours: Callable[[], Any], rival: Callable[[], Any], runs: int, device: str = "cpu"
) -> dict[str, Any]:
    """Time two pieces of work in turn, ``runs`` times, and return times and pairwise ratios."""
    a, b = [], []
    for _ in range(runs):
        a.append(seconds(ours, device))
        b.append(seconds(rival, device))
    return {
        "ours": spread(a),
        "rival": spread(b),
        "ratio": spread([y / x for x, y in zip(a, b, strict=True)]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: dict[str, float], unit: str = "s") -> str:
    """Format a spread for a person."""
    return f"{values['median']:.3g} {unit} ({values['min']:.3g} to {values['max']:.3g})"


def rates(device: str = "cpu") -> dict[str, float]:
    """Measure what the floors are counted with: products per second and bytes per second."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        x = torch.randn(2048, 2048, device=device, dtype=dtype)
        x @ x
        times = [seconds(lambda x=x: x @ x, device) for _ in range(5)]
        found[f"{name} GFLOP/s"] = 2 * 2048**3 / statistics.median(times) / 1e9
    x = torch.randn(2**26, device=device)
    y = torch.empty_like(x)
    times = [seconds(lambda: y.copy_(x), device) for _ in range(5)]
    found["copy GB/s"] = 2 * x.nbytes / statistics.median(times) / 1e9
    return found


def judge(
    figures: dict[str, Any],
    what: str,
    value: float,
    relation: Literal["at most", "at least"],
    bound: float,
) -> None:
    """Print whether a figure keeps its bound, and keep the answer among the figures."""
    met = value <= bound if relation == "at most" else value >= bound
    figures.setdefault("bounds", {})[what] = {"value": value, relation: bound, "met": met}
    print(f"{what}: {value:.3g}, {relation} {bound:g}: {'met' if met else 'MISSED'}", flush=True)


def finish(given: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures, and end with an error if a bound was missed."""
    write(given.json, figures, given.device)
    missed = [what for what, found in figures.get("bounds", {}).items() if not found["met"]]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


class Run(NamedTuple):
    """What a process took: seconds, peak memory in bytes, seconds of all its threads."""

    seconds: float
    peak: int
    cpu: float


def measured(arguments: Sequence[str]) -> Run:
    """Run a command and return what it took.

    A small process starts it: a new process's high-water mark begins with that of its parent.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    seconds, peak, cpu = done.stdout.split()
    return Run(float(seconds), int(peak) * 1024, float(cpu))


def peak_of(arguments: Sequence[str]) -> tuple[float, int]:
    """Run a command and return its wall time and its peak memory in bytes."""
    found = measured(arguments)
    return found.seconds, found.peak


def peak_memory() -> int:
    """Return this process's high-water mark in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parser(question: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    found = argparse.ArgumentParser(description=question)
    found.add_argument("--runs", type=int, default=3)
    found.add_argument("--device", default="cpu")
    found.add_argument("--json", type=Path, help="file for the figures")
    return found


def add_source(options: argparse.ArgumentParser) -> None:
    """Add the option that says of which type the checkpoints are."""
    options.add_argument("--source", choices=ACCURACY, default="float32", help="checkpoints")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure is measured on: date, processor, card and versions."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path | None, figures: dict[str, Any], device: str = "cpu") -> None:
    """Write the figures with the machine, the versions and the date."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(device), **figures}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
