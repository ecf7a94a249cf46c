"""What do the checks, the store, the lock and the diagnostics of ``mergekit-stf merge`` cost?

The 119-million-parameter Llama of ``whole_merge.py``, merged in pairs of whole processes: plain
``mergekit-yaml`` with ``stf``, then ``mergekit-stf merge`` with the same recipe, in turn. ``--only
store`` leaves its lock and diagnostics out, so that checks and store stand alone.

    python benchmarks/safety.py --json benchmarks/results/safety.json
    python benchmarks/safety.py --only store --json benchmarks/results/safety_store.json
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from harness import parser, peak_of, shown, spread, write
from whole_merge import MODEL, make, recipe

from mergekit_stf.cli.main import main as mergekit_stf
from mergekit_stf.host.run import merge as merging

OPTIONS = ["--quiet", "--no-copy-tokenizer"]


class NoDigests:
    """Stands for the hashing of the inputs, which it leaves out."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> NoDigests:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self) -> dict[Path, str]:
        return {}


class NoRecords:
    """Stands for the recorder, and writes nothing."""

    def __init__(self, _: Path) -> None:
        pass

    def write(self, _: object) -> None:
        pass

    def close(self) -> None:
        pass


def run_without_lock(arguments: list[str]) -> None:
    """Be ``mergekit-stf merge`` with checks and store and neither lock nor diagnostics."""
    nothing = SimpleNamespace(outputs=())
    with (
        patch.object(merging, "Digests", NoDigests),
        patch.object(merging, "make_lock", lambda *_, **__: nothing),
        patch.object(merging, "write_lock", lambda *_: None),
        patch.object(merging, "Recorder", NoRecords),
    ):
        mergekit_stf(["merge", *arguments], standalone_mode=False)


def cpu_of(arguments: list[str]) -> tuple[float, float]:
    """Run a command and return its wall time and the CPU time of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    elapsed, _ = peak_of(arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    if sys.argv[1:2] == ["--without-lock"]:
        run_without_lock(sys.argv[2:])
        return
    options = parser(__doc__)
    options.set_defaults(runs=4)
    for name, default in MODEL.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--density", type=float, default=0.2)
    options.add_argument("--only", choices=["store"], help="leave lock and diagnostics out")
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    programs = Path(sys.executable).parent
    commands = {
        "mergekit-yaml": [str(programs / "mergekit-yaml")],
        "mergekit-stf merge": [sys.executable, __file__, "--without-lock"]
        if given.only
        else [str(programs / "mergekit-stf"), "merge"],
    }
    walls: dict[str, list[float]] = {name: [] for name in commands}
    cpus: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given)
        path = recipe(root, "stf", given.density)
        for _ in range(given.runs):
            for name, command in commands.items():
                wall, cpu = cpu_of([*command, str(path), str(root / "out"), *OPTIONS])
                walls[name].append(wall)
                cpus[name].append(cpu)
                shutil.rmtree(root / "out")
    figures: dict[str, Any] = {"density": given.density, "left out": given.only and "lock"}
    for kind, times in (("wall", walls), ("cpu", cpus)):
        plain, safe = times.values()
        ratios = [ours / other for ours, other in zip(safe, plain, strict=True)]
        figures[kind] = {name: spread(values) for name, values in times.items()}
        figures[kind]["ratio"] = {**spread(ratios), "pairs": ratios}
        for name, values in times.items():
            print(f"{kind}, {name}: {shown(spread(values))}")
        print(f"{kind}, ratio in pairs: {shown(spread(ratios), 'x')}")
    write(given.json, figures)


if __name__ == "__main__":
    main()
