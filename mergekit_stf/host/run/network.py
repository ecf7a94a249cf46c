"""No request to a hub: what a file from elsewhere names is looked for on this machine only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from huggingface_hub import constants, try_to_load_from_cache
from mergekit.common import ModelReference

from mergekit_stf.core.errors import STFError

SETTINGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
"""One of these is in every folder that a recipe can name."""


@contextmanager
def stay_offline() -> Iterator[None]:
    """Let the host, the hub's client, and all that load through it use local files in the block.

    The host lists a model's files at the hub even if it has them, so it is told where they lie.
    """
    with (
        patch.object(constants, "HF_HUB_OFFLINE", True),
        patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
        patch.object(ModelReference, "local_path", _local_path),
    ):
        yield


@contextmanager
def heed_offline_mode() -> Iterator[None]:
    """Stay offline in the block where ``HF_HUB_OFFLINE`` asks for it.

    The host alone would ask the hub for a list of files, and refuse a model that is in the cache.
    """
    with stay_offline() if constants.HF_HUB_OFFLINE else nullcontext():
        yield


def cached_folder(name: str, revision: str | None, cache: str | None) -> Path:
    """Return the folder of a hub model in the cache on this machine.

    Args:
        name: the model's name at the hub.
        revision: a commit, branch or tag; None for the main branch.
        cache: where hub models are kept, if not in the default place.

    Raises:
        STFError: it is not there.
    """
    for file in SETTINGS:
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    raise STFError(f"{name} is not in the cache of hub models on this machine")


def _local_path(
    model: ModelReference, cache_dir: str | None = None, ignore_lora: bool = False
) -> str:
    path: str = model.model.path
    if os.path.exists(path):
        return path
    return str(cached_folder(path, model.model.revision, cache_dir))
