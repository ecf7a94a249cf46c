"""A Ray cluster: joined or started, looked at, left as it was."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.cluster.remote import named, warm_up

USAGE = "RAY_USAGE_STATS_ENABLED"
UNHANDLED = "RAY_IGNORE_UNHANDLED_ERRORS"
"""Variable with which Ray does not print the errors of tasks whose answers nobody takes: the first
error ends a merge, and is said by us."""

NICENESS = "RAY_worker_niceness"
"""Variable of how far a worker gives way to other programs, which Ray sets to 15: a merge on this
machine would stand still beside any other that computes."""

OWN_CARDS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Variable with which Ray leaves it to a task to choose the card that it was given: a process keeps
the card that it has used first, and serves tasks with several."""


@dataclass(frozen=True)
class Node:
    """A node that can merge weights.

    Attributes:
        number: Ray's.
        name: for a person.
        places: how many weights it merges at a time.
        memory: bytes that its tasks may take together.
    """

    number: str
    name: str
    places: int
    memory: int


@contextmanager
def join_cluster(address: str) -> Iterator[None]:
    """Be part of a cluster inside the block.

    A program that has joined one already stays in it.

    Args:
        address: of its head; ``auto`` for one that runs on this machine, ``local`` to start one of
            all cores and cards of this machine for the time of the block.

    Raises:
        STFError: there is none.
    """
    if ray.is_initialized():
        yield
        return
    if address.startswith("ray://"):
        raise STFError(
            f"--ray {address}: weights come back through Ray's own object store, so run the "
            "command on a node of the cluster, with --ray auto"
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _initialise(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise STFError(
            f"no Ray cluster at {address} ({_first_line(error)}); start one with `ray start "
            "--head`, or say --ray local"
        ) from error
    for number, handler in handlers.items():  # Ray puts its own in their place
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def find_nodes(threads: int, device: torch.device) -> list[Node]:
    """Return the nodes of the cluster that can merge at least one weight.

    Args:
        threads: of one weight.
        device: its kind tells whether weights take cores or cards.

    Raises:
        STFError: there are none.
    """
    found = []
    for node in ray.nodes():
        resources = node["Resources"]
        cores = int(resources.get("CPU", 0) // threads)
        places = cores if device.type == "cpu" else min(cores, int(resources.get("GPU", 0)))
        if node["Alive"] and places:
            name = named(node["NodeManagerHostname"], node["NodeID"])
            found.append(Node(node["NodeID"], name, places, int(resources.get("memory", 0))))
    if not found:
        what = "card" if device.type == "cuda" else f"node with {threads} cores"
        raise STFError(f"the Ray cluster has no {what}; --cuda and --num-threads say what is asked")
    return found


def warm_up_nodes(found: Sequence[Node], threads: int) -> None:
    """Let every place of a cluster start a process and import the package, without waiting."""
    for node in found:
        task = task_on(node, warm_up, num_cpus=threads)
        for _ in range(node.places):
            task.remote()


def task_on(node: Node, function: Callable[..., Any], **asked: Any) -> Any:
    """Return a function as a task of one node, which asks for these resources."""
    where = NodeAffinitySchedulingStrategy(node.number, soft=False)
    return ray.remote(function).options(scheduling_strategy=where, **asked)


def gather_answers(references: Sequence[Any], found: Sequence[Node]) -> list[Any]:
    """Return what a task on each of these nodes has answered.

    Raises:
        STFError: that a node raised, or the node and why it could not run the task.
    """
    ray.wait(list(references), num_returns=len(references))
    answered = []
    for reference, node in zip(references, found, strict=True):
        try:
            answered.append(ray.get(reference))
        except RayTaskError as error:
            raise cause_of(error) from None
        except (RayError, ImportError, RuntimeError) as error:
            raise STFError(
                f"node {node.name} cannot run mergekit-stf ({_first_line(error)}); install the "
                "same package there, in the Python that Ray was started with"
            ) from error
    return answered


def cause_of(error: RayTaskError) -> BaseException:
    """Return the exception that a task has raised, without Ray's traceback around it."""
    cause: BaseException = error.cause
    return cause


def _initialise(address: str) -> None:
    os.environ.setdefault(USAGE, "0")  # no request to anybody, unless the user wants it
    os.environ.setdefault(UNHANDLED, "1")
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if address == "local":
        os.environ.setdefault(NICENESS, "0")
        ray.init("local", include_dashboard=False, **common)
    else:
        ray.init(address, **common)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
