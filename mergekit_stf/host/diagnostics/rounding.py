"""Says when a recipe's ``dtype`` rounds the checkpoints before their differences are formed.

A task matrix is small beside its weights: rounded to bfloat16 first, a typical difference loses
several per cent to noise. ``out_dtype`` rounds once, at the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry

from mergekit_stf.host.checkpoints.headers import stored_header

LOG = logging.getLogger("mergekit_stf")


def note(name: str, entries: Iterable[TensorEntry]) -> None:
    """Warn once per model whose tensor came in with less precision than it is stored with.

    Tensors that no checkpoint of the host holds under this name are passed over.
    """
    for entry in entries:
        if isinstance(entry.id, ModelReference) and entry.tensor.is_floating_point():
            _note_once(entry.id, entry.tensor.dtype, name)


@functools.cache
def _note_once(model: ModelReference, dtype: torch.dtype, name: str) -> None:
    loader = LoaderCache().loaders.get(model)
    if loader is None or name not in loader.index.tensor_paths:
        return
    stored = stored_header(loader, name).dtype
    if stored.is_floating_point and torch.finfo(stored).eps < torch.finfo(dtype).eps:
        _warn_once(model, dtype, stored)


@functools.cache
def _warn_once(model: ModelReference, dtype: torch.dtype, stored: torch.dtype) -> None:
    short, stored_short = (str(d).removeprefix("torch.") for d in (dtype, stored))
    LOG.warning(
        "`dtype: %s` rounds %s, stored in %s, before the differences to the base are formed, and "
        "much of a small difference is lost; write `dtype: %s` and `out_dtype: %s` instead",
        short,
        model,
        stored_short,
        stored_short,
        short,
    )
