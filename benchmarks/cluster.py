"""What does a merge over two workers of one core each cost beside one process with two threads?

The Llama of ``whole_merge.py``, the real command from start to end in processes of its own, one
after the other in pairs: ``--num-threads 2``, then ``--ray local`` on two cores, which starts a
cluster, two workers and everything that they import. The outputs are compared first. The records
of the last merge on the cluster then say how long the discrete-event simulation should find it.

    python benchmarks/cluster.py --json benchmarks/results/cluster.json

An output of 4 GB, for the driver's memory, without waiting for decompositions:

    python benchmarks/cluster.py --hidden 2048 --inner 8192 --layers 30 --rule sum --runs 1
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from cluster_simulation import CLOSE, reproduced
from harness import distance, finish, judge, parser, peak_of, shown, spread
from safetensors.torch import load_file
from whole_merge import MODEL, make, recipe

WORKERS = 2
WAYS = {"one process": ["--num-threads", str(WORKERS)], "two workers": ["--ray", "local"]}

BOUND = 1.1
"""What the cluster may take of one process's time, for that model."""

MEMORY = 1.0
"""GB by which the driver's peak may be above that of one process."""


class Processors:
    """Seconds of processors that the children of this process use in a block, and theirs.

    Of a process that has ended counts what it had used when it was last seen, each tenth of a
    second. On a machine that others use too, this says more than the time of a clock.
    """

    def __enter__(self) -> Processors:
        """Begin to look."""
        self._used: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """The sum over all processes."""
        return sum(self._used.values())

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    times = child.cpu_times()
                    self._used[child.pid] = times.user + times.system


def command(root: Path, way: str) -> list[str]:
    """Return the command of one way to merge."""
    program = str(Path(sys.executable).with_name("mergekit-stf"))
    out = root / way.replace(" ", "-")
    return [program, "merge", str(root / "stf.yml"), str(out), "--quiet", *WAYS[way]]


def check(root: Path) -> float:
    """Return how far the two merged models are apart, relative to what the merge has changed."""
    base, here, there = (
        load_file(root / folder / "model.safetensors")
        for folder in ("base", "one-process", "two-workers")
    )
    apart = [
        distance(there[name].double() - base[name], here[name].double() - base[name])
        for name in here
    ]
    assert max(apart) < 2e-2, max(apart)
    return max(apart)


def main() -> None:
    options = parser(__doc__)
    for name, default in MODEL.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--density", type=float, default=0.2)
    options.add_argument("--rule", default="auto", help="sum decomposes nothing, for large models")
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    processors: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given)
        path = recipe(root, "stf", given.density)
        path.write_text(path.read_text() + f"parameters: {{rule: {given.rule}}}\n")
        for _ in range(given.runs):
            for way in WAYS:
                shutil.rmtree(root / way.replace(" ", "-"), ignore_errors=True)
                with Processors() as used:
                    seconds, peak = peak_of(command(root, way))
                times[way].append(seconds)
                peaks[way].append(peak / 1e9)
                processors[way].append(used.seconds)
                told = f"{used.seconds:.1f} s of processors, peak {peak / 1e9:.2f} GB"
                print(f"{way}: {seconds:.1f} s, {told}", flush=True)
        figures = reproduced(root / "two-workers" / "stf-diagnostics.jsonl", WORKERS)
        figures |= compare(times, peaks) | {"apart": check(root)}
        figures["processor seconds"] = {way: spread(used) for way, used in processors.items()}
    if all(getattr(given, name) == size for name, size in MODEL.items()):
        judge(figures, "time", figures["workers over process"]["median"], "at most", BOUND)
        judge(figures, "memory", figures["peak more, GB"]["median"], "at most", MEMORY)
        judge(figures, "simulation", figures["off by"], "at most", CLOSE)
    finish(given, figures)


def compare(times: dict[str, list[float]], peaks: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures of all pairs: times in seconds, the driver's peaks in GB."""
    ratio = spread([b / a for a, b in zip(*times.values(), strict=True)])
    more = spread([b - a for a, b in zip(*peaks.values(), strict=True)])
    print(f"two workers take {shown(ratio, 'x')} of one process, {shown(more, 'GB')} more")
    return {
        "time": {way: spread(found) for way, found in times.items()},
        "peak GB": {way: spread(found) for way, found in peaks.items()},
        "workers over process": ratio,
        "peak more, GB": more,
    }


if __name__ == "__main__":
    main()
