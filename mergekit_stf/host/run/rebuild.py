"""Make a locked merge again, under the conditions that its lock names.

A lock may come from anybody. Of what it says, a rebuild obeys the recipe, the command and the
conditions of `lock_conditions`; the files that it reads are those that the lock lists.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.inputs import InputModel, input_models
from mergekit_stf.host.executors.execution import Executor
from mergekit_stf.host.provenance.conditions import describe_machine
from mergekit_stf.host.provenance.lock import FILE_NAME, Lock, device_name, read_lock
from mergekit_stf.host.recipe.recipe import Recipe, check_recipe
from mergekit_stf.host.run.lora import merge_to_adapter, merge_to_model
from mergekit_stf.host.run.merge import merge_recipe
from mergekit_stf.host.run.network import stay_offline

MOST_THREADS = 1024
"""Threads that a rebuild starts at most; no machine merges with more, and a system refuses many."""

RANK = re.compile(r"[1-9][0-9]{0,8}")

LOG = logging.getLogger(__name__)


def rebuild(
    lock: Lock,
    out: Path,
    cache: str | None = None,
    trust_remote_code: bool = False,
    executor: Executor | None = None,
) -> Lock:
    """Merge the recipe of a lock into ``out`` with its options and number of threads.

    The hub is not asked: its models are taken from the cache on this machine.

    Args:
        lock: the lock of the merge to repeat.
        out: a folder that is not there yet.
        cache: where hub models are kept, if not in the default place.
        trust_remote_code: run code from the models' folders if the merge did.
        executor: runs the weights; this process where none is given.

    Raises:
        STFError: the lock's recipe or conditions cannot be used here, or its recipe asks for other
            models and files than it lists.
    """
    options = lock.options.restore(cache, trust_remote_code and lock.options.trust_remote_code)
    if len(lock.workers) > 1:
        raise STFError(
            f"merged on different kinds of devices ({', '.join(lock.workers)}), any of which may "
            "have merged a weight; its bytes cannot be compared"
        )
    if executor is None:
        _check_device(lock, options.device or "cpu")
    _check_conditions(lock)
    recipe = check_recipe(lock.recipe, FILE_NAME)
    threads = torch.get_num_threads()
    with stay_offline():
        _check_inputs(lock, input_models(recipe.config, options))
        torch.set_num_threads(lock.threads)
        try:
            return _again(lock, recipe, out, options, executor)
        finally:
            torch.set_num_threads(threads)


def _check_device(lock: Lock, device: str) -> None:
    try:
        torch.zeros(1, device=device)
        here = device_name(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise STFError(f"merged on {lock.device}, and {device} is not to be had here") from error
    if here != lock.device:
        raise STFError(f"merged on {lock.device}, here is {here}; its bytes cannot be compared")


def _check_conditions(lock: Lock) -> None:
    if lock.threads > MOST_THREADS:
        raise STFError(f"{FILE_NAME}: {lock.threads} threads; at most {MOST_THREADS} are started")
    now = describe_machine()
    if now.vectors != lock.machine.vectors:
        LOG.warning("the processor has other vector instructions; bytes may differ for that reason")
    if now.kernels != lock.machine.kernels:
        LOG.warning(
            "merged with other kernels (%s) than here (%s); bytes may differ for that reason",
            lock.machine.kernels,
            now.kernels,
        )


def _check_inputs(lock: Lock, models: Sequence[InputModel]) -> None:
    """Refuse a recipe of other inputs than the lock lists, which `find_differences` has checked."""
    listed = {m.reference: (m.commit, {file.name for file in m.files}) for m in lock.models}
    here = {model.reference: (model.commit, set(model.files)) for model in models}
    for reference in sorted(listed.keys() | here.keys()):
        if listed.get(reference) != here.get(reference):
            raise STFError(
                f"{FILE_NAME}: its recipe reads {reference} here as other files, or as another "
                "commit, than its list of models says; merge again"
            )


def _again(
    lock: Lock, recipe: Recipe, out: Path, options: MergeOptions, executor: Executor | None
) -> Lock:
    if executor is not None and lock.command[0] == "lora":
        raise STFError("adapters in factors are merged on one machine; leave --ray out")
    match lock.command:
        case ("merge",):
            again = merge_recipe(recipe, out, options, executor=executor).lock
            if executor is not None and lock.workers and again.workers != lock.workers:
                raise STFError(
                    f"merged on {lock.workers[0]}, the cluster has {', '.join(again.workers)}; "
                    "its bytes cannot be compared"
                )
            return again
        case ("lora",):
            merge_to_model(recipe, out, options, locked=True)
        case ("lora", "--adapter"):
            merge_to_adapter(recipe, out, options, locked=True)
        case ("lora", "--adapter", "--max-rank", rank) if RANK.fullmatch(rank):
            merge_to_adapter(recipe, out, options, int(rank), locked=True)
        case _:
            raise STFError(f"{FILE_NAME}: its command is damaged; merge again")
    return read_lock(out)
