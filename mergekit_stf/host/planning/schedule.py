"""How long the weights of a merge take on a cluster, from what each takes on one device."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from mergekit_stf.host.planning.estimate import Estimate

OTHERS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of places for which a merge is estimated besides the cluster's own."""


@dataclass(frozen=True)
class Places:
    """Where a cluster merges.

    Attributes:
        nodes: their names.
        count: how many weights they merge at a time.
        threads: of torch, for each of them.
    """

    nodes: tuple[str, ...]
    count: int
    threads: int


class ClusterEstimate(BaseModel):
    """Time of a merge with ``--ray``, if every place is as fast as this device.

    Attributes:
        nodes: names of the nodes.
        places: how many weights are merged at a time.
        threads: of torch, for each of them.
        seconds: of the whole process, its start and files included.
        by_places: the same for other numbers of places.
    """

    nodes: list[str]
    places: int
    threads: int
    seconds: float
    by_places: dict[int, float]


def estimate_cluster(estimated: Estimate, places: Places) -> ClusterEstimate:
    """Estimate a merge on a cluster.

    Reading over a network and a driver that cannot write as fast as weights come are not counted;
    ``benchmarks/cluster_simulation.py`` counts them.

    Args:
        estimated: the merge on this device, with so many threads.
        places: of the cluster.
    """
    weights, rest = list(estimated.by_weight.values()), estimated.starting + estimated.files
    return ClusterEstimate(
        nodes=list(places.nodes),
        places=places.count,
        threads=places.threads,
        seconds=rest + schedule_length(weights, places.count),
        by_places={number: rest + schedule_length(weights, number) for number in OTHERS},
    )


def schedule_length(seconds: Sequence[float], places: int) -> float:
    """Return when the last weight is done, if each begins in turn as soon as a place is free.

    Args:
        seconds: of each weight, in the order in which they begin.
        places: how many run at a time.
    """
    free = [0.0] * places
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)
