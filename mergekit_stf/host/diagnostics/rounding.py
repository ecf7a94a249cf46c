"""Says when a recipe's ``dtype`` rounds the checkpoints before their differences are formed.

A task matrix is small beside its weights: rounded to bfloat16 first, a typical difference loses
several per cent to noise. ``out_dtype`` rounds once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import TensorEntry

from mergekit_stf.host.checkpoints.headers import stored_header
from mergekit_stf.host.compat import find_loader
from mergekit_stf.host.diagnostics.notices import Notice


def find_rounded_inputs(name: str, entries: Iterable[TensorEntry]) -> Iterator[Notice]:
    """Yield a notice for each model whose tensor came with less precision than it is stored with.

    Tensors that no checkpoint of the host holds under this name are passed over.

    Args:
        name: of the weight.
        entries: what the host hands to the method.
    """
    for entry in entries:
        if not isinstance(entry.id, ModelReference) or not entry.tensor.is_floating_point():
            continue
        loader, dtype = find_loader(entry.id), entry.tensor.dtype
        if loader is None or name not in loader.index.tensor_paths:
            continue
        stored = stored_header(loader, name).dtype
        if stored.is_floating_point and torch.finfo(stored).eps < torch.finfo(dtype).eps:
            yield Notice(f"rounding {entry.id}", _text(entry.id, dtype, stored))


def _text(model: ModelReference, dtype: torch.dtype, stored: torch.dtype) -> str:
    short, wide = (str(d).removeprefix("torch.") for d in (dtype, stored))
    return (
        f"`dtype: {short}` rounds {model}, stored in {wide}, before the differences to the base "
        f"are formed, and much of a small difference is lost; write `dtype: {wide}` and "
        f"`out_dtype: {short}` instead"
    )
