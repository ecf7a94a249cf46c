"""Are the tools' promises kept: the estimates of plan, the cost of sweep, the cost of diagnostics?

On the 119-million-parameter Llama of ``whole_merge.py``, each command in a process of its own, in
turn: ``plan`` against what ``merge`` then takes; ``sweep`` over nine values of lambda against one
``merge`` and the writing of nine outputs; recording diagnostics against the merge's own time. With
``--method`` only ``plan`` against ``merge``, for each of these methods.

    python benchmarks/tools.py --json benchmarks/results/tools.json
    python benchmarks/tools.py --method stf wudi tsv_m iso_c --json benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import finish, judge, parser, peak_of, seconds, shown, spread, task_matrices
from safetensors.torch import load_file, save_file
from whole_merge import MODEL, make, recipe

from mergekit_stf.core import superpose
from mergekit_stf.host.diagnostics import records as diagnostics

POINTS = "0.4:1.2:0.1"
NEAR = 1.5
"""How far, as a factor, an estimate may be from what the merge takes on a machine that is idle."""
COMMAND = str(Path(sys.executable).with_name("mergekit-stf"))


def planned(path: Path, out: Path) -> dict[str, float]:
    """Return the estimates of ``plan``."""
    arguments = [COMMAND, "plan", str(path), "--out", str(out), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)["estimate"]
    return found


def records(out: Path) -> list[dict[str, float]]:
    """Return the records of a merge."""
    lines = (out / diagnostics.FILE_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def writing(out: Path, count: int) -> float:
    """Return the seconds that writing so many outputs to the disk takes, each into a new file."""
    tensors = load_file(out / "model.safetensors")
    copies = [out.parent / f"written{number}.safetensors" for number in range(count)]

    def work() -> None:
        for copy in copies:
            save_file(tensors, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())

    found = seconds(work)
    for copy in copies:
        copy.unlink()
    return found


def recording(root: Path) -> float:
    """Return the seconds that one record takes."""
    matrices = task_matrices((1024, 1024), 3)
    record = superpose(matrices, source_dtype=torch.bfloat16).record
    whole = replace(record, name="model.layers.0.mlp.up_proj.weight", rule="superpose")
    with contextlib.closing(diagnostics.Recorder(root / "d.jsonl")) as recorder:
        times = [seconds(lambda: recorder.write(whole)) for _ in range(100)]
    return statistics.median(times)


def compare_plans(root: Path, given: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Judge what ``plan`` estimates of each method against what ``merge`` takes."""
    for method in given.method:
        path, out = recipe(root, method, given.density), root / "out"
        time, memory = [], []
        for _ in range(given.runs):
            estimate = planned(path, out)
            merge, _ = peak_of([COMMAND, "merge", str(path), str(out), "--quiet"])
            peak = max(record["peak_rss"] for record in records(out))
            time.append(estimate["seconds"] / merge)
            memory.append(estimate["memory"] / peak)
            shutil.rmtree(out)
        for what, values in (("time", time), ("memory", memory)):
            name = f"plan's {what} over the merge's, {method}"
            figures[name] = spread(values)
            print(f"{name}: {shown(spread(values), 'x')}")
            judge_nearness(figures, name, given)


def judge_nearness(figures: dict[str, Any], name: str, given: argparse.Namespace) -> None:
    """Judge that an estimate is near, from both sides, at the size that the bound is meant for."""
    if all(getattr(given, key) == size for key, size in MODEL.items()):
        judge(figures, name, figures[name]["median"], "at most", NEAR)
        judge(figures, f"{name}, at the least", figures[name]["median"], "at least", 1 / NEAR)


def main() -> None:
    options = parser(__doc__)
    for name, default in MODEL.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--density", type=float, default=0.2)
    options.add_argument("--method", nargs="+", default=[])
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    ratios: dict[str, list[float]] = {
        "plan's time over the merge's": [],
        "plan's memory over the merge's": [],
        "sweep, less the writing, over one merge": [],
        "diagnostics over the merge": [],
    }
    times: dict[str, list[float]] = {"merge": [], "sweep of 9": [], "writing of 9": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given)
        if given.method:
            figures: dict[str, Any] = {"load": os.getloadavg()[0]}
            compare_plans(root, given, figures)
            finish(given, figures)
            return
        path, out, points = recipe(root, "stf", given.density), root / "out", root / "points"
        for _ in range(given.runs):
            estimate = planned(path, out)
            merge, _ = peak_of([COMMAND, "merge", str(path), str(out), "--quiet"])
            peak = max(record["peak_rss"] for record in records(out))
            arguments = ["sweep", str(path), str(points), "--lambda", POINTS, "--quiet"]
            sweep, _ = peak_of([COMMAND, *arguments])
            nine, count = writing(out, 9), len(records(out))
            same = (points / "lambda-0.8" / "model.safetensors").read_bytes()
            assert same == (out / "model.safetensors").read_bytes()
            for name, value in zip(
                ratios,
                (
                    estimate["seconds"] / merge,
                    estimate["memory"] / peak,
                    (sweep - nine) / merge,
                    recording(root) * count / merge,
                ),
                strict=True,
            ):
                ratios[name].append(value)
            for name, value in zip(times, (merge, sweep, nine), strict=True):
                times[name].append(value)
            shutil.rmtree(out)
            shutil.rmtree(points)
    for name, values in times.items():
        print(f"{name}: {shown(spread(values))}")
    for name, values in ratios.items():
        print(f"{name}: {shown(spread(values), 'x')}")
    figures = {name: spread(values) for name, values in {**times, **ratios}.items()}
    for name in ("plan's time over the merge's", "plan's memory over the merge's"):
        judge_nearness(figures, name, given)
    finish(given, figures)


if __name__ == "__main__":
    main()
