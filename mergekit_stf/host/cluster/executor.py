"""The executor of ``--ray``: the weights of a merge on the nodes of a Ray cluster."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.cluster.joining import (
    OWN_CARDS,
    Node,
    find_nodes,
    gather_answers,
    join_cluster,
    task_on,
    warm_up_nodes,
)
from mergekit_stf.host.cluster.remote import check_this_node, merge_on_node
from mergekit_stf.host.cluster.tasks import RETRIES, Tasks
from mergekit_stf.host.compat import executing
from mergekit_stf.host.executors.execution import Devices, Execution
from mergekit_stf.host.executors.jobs import Job, share_of_card
from mergekit_stf.host.executors.messages import Merge, Order
from mergekit_stf.host.executors.nodes import expected_of
from mergekit_stf.host.executors.pipeline import Pipeline
from mergekit_stf.host.planning.preflight import format_bytes
from mergekit_stf.host.planning.schedule import Places

LOG = logging.getLogger("mergekit_stf")


class RayExecutor:
    """Runs the weights of a merge on a cluster that this process has joined.

    Args:
        options: the host's.
        threads: of torch, for one weight.
    """

    spools = True

    def __init__(self, options: MergeOptions, threads: int) -> None:
        self._device = torch.device(options.device or "cpu")
        self._threads = threads
        warm_up_nodes(find_nodes(threads, self._device), threads)

    @contextmanager
    def executing(self, execution: Execution) -> Iterator[Devices]:
        """Check every node, and merge on the cluster what the host merges in the block.

        Raises:
            STFError: a node lacks something, or has another version.
        """
        number, devices = uuid.uuid4().hex, Devices()
        expected = expected_of(execution.models)
        known = execution.store.keys()
        merge = Merge(number, execution.options, self._threads, expected, known)
        shared = ray.put(merge)
        found = find_nodes(self._threads, self._device)
        memory = self._checked(found, shared)
        submit = _submit(shared, self._device, self._threads, memory)
        tasks = Tasks(execution, submit, sum(node.places for node in found), devices)

        def start(jobs: Sequence[Job], spool: Any) -> Any:
            _check_memory(jobs, found, self._device)
            return tasks.started(jobs, spool)

        def pipeline(targets: Sequence[Any], **_: Any) -> Pipeline:
            here = self._device if torch.cuda.is_available() else torch.device("cpu")
            return Pipeline(targets, execution, here, start)

        with executing(pipeline):
            yield devices

    def _checked(self, found: Sequence[Node], merge: Any) -> int:
        """Check all nodes, and return the memory of the smallest card."""
        cards = 1 if self._device.type == "cuda" else 0
        asked = {"num_cpus": 0, "num_gpus": cards} | _environment(self._device)
        answers = [task_on(node, check_this_node, **asked).remote(merge) for node in found]
        told = gather_answers(answers, found)
        kinds = {name: kind for name, kind, _ in told}
        if len(set(kinds.values())) > 1:
            listed = "; ".join(f"{kind} ({name})" for name, kind in sorted(kinds.items()))
            LOG.warning(
                "the nodes have different devices, so that another run may give other bytes: %s",
                listed,
            )
        smallest: int = min(memory for _, _, memory in told)
        return smallest


@contextmanager
def ray_executor(address: str, options: MergeOptions) -> Iterator[RayExecutor]:
    """Join a cluster for the time of the block, and merge there.

    Torch has one thread a weight on each core of a CPU, unless ``--num-threads`` says otherwise;
    here too, so that what stays in this process is merged alike.

    Args:
        address: see ``join_cluster``.
        options: the host's.

    Raises:
        STFError: there is no cluster, or it cannot do what the options ask.
    """
    with _joined(address, options) as threads:
        yield RayExecutor(options, threads)


@contextmanager
def look_at(address: str, options: MergeOptions) -> Iterator[Places]:
    """Give the places of a cluster that would merge, with torch's threads as ``ray_executor``.

    Args:
        address: see ``join_cluster``.
        options: the host's.

    Raises:
        STFError: as ``ray_executor``.
    """
    with _joined(address, options) as threads:
        found = find_nodes(threads, torch.device(options.device or "cpu"))
        names, count = tuple(node.name for node in found), sum(node.places for node in found)
        yield Places(names, count, threads)


@contextmanager
def _joined(address: str, options: MergeOptions) -> Iterator[int]:
    """Be part of a cluster, with the threads of torch that a weight gets there."""
    if options.multi_gpu:
        raise STFError("--multi-gpu is the host's way to several cards; with --ray say --cuda")
    threads, before = options.num_threads or 1, torch.get_num_threads()
    with join_cluster(address):
        torch.set_num_threads(threads)
        try:
            yield threads
        finally:
            torch.set_num_threads(before)


def _submit(
    merge: Any, device: torch.device, threads: int, card: int
) -> Callable[[Job, Order], Any]:
    """Return what hands a job to Ray."""
    merging = {"max_retries": RETRIES, "max_calls": 0, "num_cpus": threads}
    task = ray.remote(**merging, scheduling_strategy="SPREAD")(merge_on_node)
    own = _environment(device)

    def submit(job: Job, order: Order) -> Any:
        share = share_of_card(device, job.device_memory(device), card)
        asked = {"memory": job.memory(device), "num_gpus": share, "name": job.name} | own
        return task.options(**asked).remote(order, merge)

    return submit


def _environment(device: torch.device) -> dict[str, Any]:
    """Return what a task asks for besides resources: on cards, to choose its own."""
    return {"runtime_env": {"env_vars": {OWN_CARDS: "1"}}} if device.type == "cuda" else {}


def _check_memory(jobs: Sequence[Job], found: Sequence[Node], device: torch.device) -> None:
    """Refuse a weight that no node has memory for: Ray would wait for such a node."""
    largest = max(jobs, key=lambda job: job.memory(device))
    most = max(node.memory for node in found)
    if largest.memory(device) > most:
        raise STFError(
            f"{largest.name} needs {format_bytes(largest.memory(device))} of memory, and no node "
            f"of the cluster gives more than {format_bytes(most)}; see `ray start --memory`"
        )
