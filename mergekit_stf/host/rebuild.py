"""Make a locked merge again, under the conditions that its lock names."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapter_run import merge_to_adapter, merge_to_model
from mergekit_stf.host.lock import FILE_NAME, Lock, device_name, machine, read_lock
from mergekit_stf.host.merging import merge
from mergekit_stf.host.recipe import check_recipe

LOG = logging.getLogger(__name__)


def rebuild(lock: Lock, out: Path, cache: str | None = None) -> Lock:
    """Merge the recipe of a lock into ``out`` with its options and number of threads.

    Args:
        lock: the lock of the merge to repeat.
        out: a folder that is not there yet.
        cache: where hub models are kept, if not in the default place.

    Raises:
        STFError: the lock's recipe or options cannot be used here.
    """
    options = _options(lock, cache)
    device = device_name(options.device or "cpu")
    if device != lock.device:
        raise STFError(f"merged on {lock.device}, here is {device}; its bytes cannot be compared")
    if machine()["vectors"] != lock.machine.get("vectors"):
        LOG.warning("the processor has other vector instructions; bytes may differ for that reason")
    threads = torch.get_num_threads()
    torch.set_num_threads(lock.threads)
    try:
        return _again(lock, out, options)
    finally:
        torch.set_num_threads(threads)


def _again(lock: Lock, out: Path, options: MergeOptions) -> Lock:
    recipe = check_recipe(lock.recipe, FILE_NAME)
    match lock.command:
        case ("merge",):
            return merge(recipe, out, options).lock
        case ("lora",):
            merge_to_model(recipe, out, options, locked=True)
        case ("lora", "--adapter"):
            merge_to_adapter(recipe, out, options, locked=True)
        case ("lora", "--adapter", "--max-rank", rank) if rank.isdecimal():
            merge_to_adapter(recipe, out, options, int(rank), locked=True)
        case _:
            raise STFError(f"{FILE_NAME}: its command is damaged; merge again")
    return read_lock(out)


def _options(lock: Lock, cache: str | None) -> MergeOptions:
    try:
        given = {**lock.options, "transformers_cache": cache, "quiet": True}
        return MergeOptions.model_validate(given)
    except (ValidationError, ValueError) as error:
        raise STFError(f"{FILE_NAME}: its options are damaged; merge again") from error
