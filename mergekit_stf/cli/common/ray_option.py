"""The option ``--ray``, which the commands that merge share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.executors.execution import Executor
from mergekit_stf.host.planning.schedule import Places
from mergekit_stf.host.plugin.options import MergeOptions

F = TypeVar("F", bound=Callable[..., Any])


def add_ray_option(command: F) -> F:
    """Add ``--ray``, as ``ray_address``."""
    return click.option(
        "--ray",
        "ray_address",
        metavar="ADDRESS",
        help="Merge on a Ray cluster: its address, `auto` for one that runs on this machine, or "
        "`local` for all cores or cards of this machine.",
    )(command)


@contextmanager
def open_executor(ray_address: str | None, options: MergeOptions) -> Iterator[Executor | None]:
    """Give the executor that merges in the block, None where this process merges.

    Args:
        ray_address: of a cluster, None to merge in this process.
        options: the host's.

    Raises:
        STFError: Ray is not installed, or the cluster cannot be used.
    """
    if ray_address is None:
        yield None
        return
    _check_installed()
    from mergekit_stf.host.cluster.executor import ray_executor

    with ray_executor(ray_address, options) as cluster:
        yield cluster


@contextmanager
def look_at_cluster(ray_address: str | None, options: MergeOptions) -> Iterator[Places | None]:
    """Give the places of a cluster, None without an address, with torch's threads as there.

    Raises:
        STFError: as ``open_executor``.
    """
    if ray_address is None:
        yield None
        return
    _check_installed()
    from mergekit_stf.host.cluster.executor import look_at

    with look_at(ray_address, options) as places:
        yield places


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise STFError("--ray needs Ray: pip install 'mergekit-stf[ray]'")
