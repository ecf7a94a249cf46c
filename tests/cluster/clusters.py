"""Real Ray clusters of several nodes on this machine, joined over the loopback."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - on a busy machine nice workers would never end

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="RAY IS NOT INSTALLED: no wheel for this Python? Nothing of --ray is tested",
)

pytestmark = [
    needs_ray,
    pytest.mark.slow,
    # Ray leaves sockets and processes to the system when a driver ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*:FutureWarning"),
]
"""For every module that starts a cluster."""


@contextmanager
def cluster(nodes: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    """Start a cluster of nodes with one core each, with these variables in their environments."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=False)
    try:
        for variables in nodes:
            started.add_node(
                num_cpus=1, object_store_memory=10**8, memory=4 * 10**9, env_vars=dict(variables)
            )
        yield started
    finally:
        started.shutdown()


@contextmanager
def member(address: str) -> Iterator[None]:
    """Join a cluster, so that the merges in the block share its processes."""
    import ray

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()
