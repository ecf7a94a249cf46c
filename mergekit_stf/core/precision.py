"""Float32 means float32: no TF32 and no bfloat16 products while the engine runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_entered = 0
_outside = "highest"


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch reduced-precision products off, and back when the last thread has left."""
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
