"""Float32 means float32, and float64 is taken in portions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 2**25
"""Entries of a task matrix that are converted to float64 at a time."""

_lock = threading.Lock()
_entered = 0
_outside = "highest"


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 products off, and back when the last thread has left."""
    global _entered, _outside
    with _lock:
        if not _entered:
            _outside = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _entered += 1
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                torch.set_float32_matmul_precision(_outside)


def split(M: Tensor) -> tuple[Tensor, ...]:
    """Return ``M``, (m, n), as parts of rows of at most ``CHUNK`` entries, one row at least."""
    return torch.split(M, max(1, CHUNK // M.shape[1]))
