"""How does a merge scale over cards, and which order of the weights is best?

A discrete-event simulation of ``--ray``: workers take weights in a given order, read their tensors
from a shared file system, merge them, and send the result to the driver, which writes it. Reading,
sending and writing share bandwidth: each is a line of jobs that are served one after another, in
pieces so small that the order within the line does not matter.

    python benchmarks/cluster_simulation.py --json benchmarks/results/cluster_simulation.json

Seconds of a weight come from what an H200 has taken, ``FLOPS`` below. With ``--measured FILE`` they
come from the records of a real merge on this machine, whose length the simulation has to reproduce.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import finish, judge, parser

FLOPS = 1.06e13
"""Operations a second of a card, counted as 14 n³ for the decomposition of a matrix of the smaller
side n and 4 m n² for its products, a task: the 224 matrices of Llama-2-7B x 3 took 91 s on an H200
(``model_shapes.py llama-2-7b --device cuda``), and are 9.6e14 of them."""

LATENCY = 0.02
"""Seconds that a weight takes at least: Ray's hand-over, opening files, launches."""

START = 12.0
"""Seconds until the first weight begins: Ray, imports, checks."""

CLOSE = 0.15
"""How far a simulated merge may be from the real one, relative to its length."""

CARDS = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Weight:
    """A weight: its place in the output, seconds to merge, and bytes.

    Attributes:
        read: by the worker.
        written: of the output.
        matrix: for the store.
    """

    place: int
    seconds: float
    read: float
    written: float
    matrix: float


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes a second: of the shared file system, of the driver's network and disk.

    Attributes:
        store: bytes that the driver's store may take.
    """

    read: float
    network: float
    disk: float
    store: float


@dataclass(frozen=True)
class Outcome:
    """What a simulated merge took: seconds, and the share of the time in which workers merged."""

    seconds: float
    busy: float
    read: float
    driver: float

    @property
    def bound(self) -> str:
        """What it waited for."""
        shares = {"merging": self.busy, "reading": self.read, "the driver": self.driver}
        return max(shares, key=shares.__getitem__)


def simulate(weights: Sequence[Weight], cards: int, machine: Machine, ahead: int = 2) -> Outcome:
    """Run weights in the given order on so many cards.

    A worker that is free takes the next weight, unless ``ahead`` weights for each card are merged
    or wait for the driver. It reads, merges, and hands the result to the driver, which stores the
    matrix while the store has room, and writes the weight: at once where all before it in the
    output are written, else into a file of its own, from which it is written again when it is due.
    """
    order, idle, flying, now = deque(weights), cards, 0, START
    reading = driver = START
    events: list[tuple[float, int, Weight | None]] = []
    spooled, room = Spooled(), machine.store
    busy = read = served = 0.0
    while order or events:
        while order and idle and flying < ahead * cards:
            weight = order.popleft()
            reading = max(reading, now) + weight.read / machine.read
            read += weight.read / machine.read
            busy += LATENCY + weight.seconds
            heapq.heappush(events, (reading + LATENCY + weight.seconds, weight.place, weight))
            idle, flying = idle - 1, flying + 1
        now, place, done = heapq.heappop(events)
        if done is None:
            flying -= 1
            continue
        idle += 1
        stored = done.matrix if done.matrix <= room else 0.0
        room -= stored
        disk = stored + spooled.written(done)
        taken = (stored + done.written) / machine.network + disk / machine.disk
        driver = max(driver, now) + taken
        served += taken
        heapq.heappush(events, (driver, place, None))
    length = now - START
    return Outcome(now, busy / (cards * length), read / length, served / length)


class Spooled:
    """What waits to be written in its turn."""

    def __init__(self) -> None:
        self._waiting: dict[int, float] = {}
        self._due = 0

    def written(self, weight: Weight) -> float:
        """Return the bytes that the driver writes when this weight comes."""
        self._waiting[weight.place] = weight.written
        total = 0.0 if weight.place == self._due else weight.written
        while self._due in self._waiting:
            total += self._waiting.pop(self._due)
            self._due += 1
        return total


def in_order(weights: Iterable[Weight]) -> list[Weight]:
    """The order of the output, in which ``--ray`` begins weights."""
    return sorted(weights, key=lambda weight: weight.place)


def costliest_first(weights: Iterable[Weight]) -> list[Weight]:
    """The costliest first, whatever it is written after."""
    return sorted(weights, key=lambda weight: (-weight.seconds, weight.place))


def cheapest_first(weights: Iterable[Weight]) -> list[Weight]:
    """The cheapest first."""
    return costliest_first(weights)[::-1]


ORDERS: dict[str, Callable[[Iterable[Weight]], list[Weight]]] = {
    "output": in_order,
    "costliest": costliest_first,
    "cheapest": cheapest_first,
}


def weight(place: int, rows: int, columns: int, models: int, count: int = 1) -> Weight:
    """Return a weight of one or several matrices in bfloat16, merged exactly by ``stf``."""
    n, entries = min(rows, columns), rows * columns
    work = models * (14 * n**3 + 4 * entries * n) * count
    size = 2.0 * entries * count
    return Weight(place, work / FLOPS, (models + 1) * size, size, 2 * size)


def added(place: int, entries: int, models: int) -> Weight:
    """Return a weight whose differences are added: an embedding."""
    size = 2.0 * entries
    return Weight(place, entries * (models + 1) / 2e10, (models + 1) * size, size, 0)


def llama_70b(models: int) -> list[Weight]:
    """Llama-3-70B: 80 layers of 8192, 28672 inside, 8 of 64 heads for keys and values."""
    layer = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 3
    found = [added(0, 128256 * 8192, models)]
    for shape in layer * 80:
        found.append(weight(len(found), *shape, models))
    return [*found, added(len(found), 128256 * 8192, models)]


def deepseek_v3(models: int) -> list[Weight]:
    """DeepSeek-V3: 61 layers of 7168, 256 experts of 2048 and a shared one in 58 of them."""
    attention = [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)]
    dense, expert = [(18432, 7168)] * 3, [(2048, 7168)] * 3
    found = [added(0, 129280 * 7168, models)]
    for number in range(61):
        inner = dense if number < 3 else expert * 257
        for shape in attention + inner:
            found.append(weight(len(found), *shape, models))
    return [*found, added(len(found), 129280 * 7168, models)]


def qwen3_235b(models: int, fused: bool) -> list[Weight]:
    """Qwen3-235B-A22B: 94 layers of 4096, 128 experts of 1536, as 384 matrices or as two stacks."""
    attention = [(8192, 4096), (512, 4096), (512, 4096), (4096, 8192)]
    found = [added(0, 151936 * 4096, models)]
    for _ in range(94):
        for shape in attention:
            found.append(weight(len(found), *shape, models))
        if fused:
            found.append(weight(len(found), 3072, 4096, models, 128))
            found.append(weight(len(found), 4096, 1536, models, 128))
        else:
            for shape in [(1536, 4096)] * 384:
                found.append(weight(len(found), *shape, models))
    return [*found, added(len(found), 151936 * 4096, models)]


CASES = {
    "Llama-3-70B x 3": lambda: llama_70b(3),
    "DeepSeek-V3 x 3": lambda: deepseek_v3(3),
    "Qwen3-235B x 4, experts apart": lambda: qwen3_235b(4, fused=False),
    "Qwen3-235B x 4, experts in stacks": lambda: qwen3_235b(4, fused=True),
}


def reproduced(file: Path, workers: int) -> dict[str, Any]:
    """Simulate a real merge from the seconds of its weights, and compare the lengths.

    Args:
        file: the records of a merge with ``--ray``, which say when each weight was begun.
        workers: how many merged at a time.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    begun = min(line["started"] for line in lines)
    length = max(line["started"] + line["seconds"] for line in lines) - begun
    endless = Machine(float("inf"), float("inf"), float("inf"), 0)
    weights = [Weight(place, line["seconds"], 0, 0, 0) for place, line in enumerate(lines)]
    simulated = simulate(in_order(weights), workers, endless).seconds - START
    figures = {"measured": length, "simulated": simulated, "off by": abs(simulated / length - 1)}
    print(f"{length:.2f} s from the first weight to the last, simulated {simulated:.2f} s")
    return figures


def rows(given: argparse.Namespace) -> list[dict[str, object]]:
    """Simulate every case on every number of cards."""
    rates = (given.read, given.network, given.disk, given.store)
    machine = Machine(*(1e9 * rate for rate in rates))
    found: list[dict[str, object]] = []
    for name in (name for name in CASES if name.startswith(given.only)):
        weights = CASES[name]()
        for cards in CARDS:
            took = {key: simulate(order(weights), cards, machine) for key, order in ORDERS.items()}
            ours = took["output"]
            row: dict[str, object] = {"case": name, "cards": cards, "bound": ours.bound}
            row |= {key: round(outcome.seconds) for key, outcome in took.items()}
            found.append(row | {"merging": round(ours.busy, 2), "driver": round(ours.driver, 2)})
            print(" ".join(f"{key}={value}" for key, value in found[-1].items()))
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--read", type=float, default=20.0, help="GB/s of the file system")
    arguments.add_argument("--network", type=float, default=12.0, help="GB/s into the driver")
    arguments.add_argument("--disk", type=float, default=3.0, help="GB/s that the driver writes")
    arguments.add_argument("--store", type=float, default=64.0, help="GB of the store")
    arguments.add_argument("--only", default="", help="models whose name begins so")
    arguments.add_argument("--measured", type=Path, help="records of a real merge")
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    if given.measured:
        figures = reproduced(given.measured, given.workers)
        judge(figures, "off by", figures["off by"], "at most", CLOSE)
    else:
        settings = {name: getattr(given, name) for name in ("read", "network", "disk", "store")}
        figures = {"GB": settings, "rows": rows(given)}
    finish(given, figures)


if __name__ == "__main__":
    main()
