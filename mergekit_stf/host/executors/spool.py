"""Merged weights that wait for their turn to be written: a little memory, beyond it files."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY = 2**28
"""Bytes of waiting weights that stay in memory."""


class Spool:
    """Weights by name, put in by one thread in any order and taken by another in the output's.

    Args:
        folder: for the files; it is made when one is needed.
        memory: bytes that stay in memory.
    """

    def __init__(self, folder: Path, memory: int = MEMORY) -> None:
        self._folder, self._memory = folder, memory
        self._held: dict[str, Tensor | Path | None] = {}
        self._taken = 0
        self._files = itertools.count()
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Keep a weight until it is taken.

        Args:
            name: of the weight.
            tensor: its entries on the CPU; None where the output has no such weight.
        """
        size = 0 if tensor is None else tensor.nbytes
        with self._changed:
            fits = self._taken + size <= self._memory
            if fits:
                self._taken += size
        held: Tensor | Path | None = tensor
        if tensor is not None and not fits:
            held = self._written(tensor)
        with self._changed:
            self._held[name] = held
            self._changed.notify_all()

    def take(self, name: str) -> Tensor | None:
        """Wait for a weight and return it; one that lies in a file is read when it is used.

        Raises:
            BaseException: what `fail` was told.
        """
        with self._changed:
            self._changed.wait_for(lambda: name in self._held or self._error is not None)
            if name not in self._held:
                assert self._error is not None
                raise self._error
            held = self._held.pop(name)
            if isinstance(held, Tensor):
                self._taken -= held.nbytes
        return _mapped(held) if isinstance(held, Path) else held

    def fail(self, error: BaseException) -> None:
        """Let whoever waits for a weight that is not there have an error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _written(self, tensor: Tensor) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{next(self._files)}.safetensors"
        save_file({"weight": tensor.contiguous()}, path)
        return path


def _mapped(path: Path) -> Tensor:
    """Return the tensor in a file, whose place on the disk is free once the tensor is gone."""
    tensor: Tensor = load_file(path)["weight"]
    with suppress(OSError):  # Windows removes no file that is in use; the folder goes at the end
        os.unlink(path)
    return tensor
