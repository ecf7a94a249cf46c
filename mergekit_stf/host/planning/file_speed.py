"""How quickly this machine hashes and writes files, measured on the disk of an output."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_stf.core.errors import STFError

SAMPLE = 16 * 2**20
"""Bytes that are hashed and written to measure it."""


@dataclass(frozen=True)
class FileSpeed:
    """What one byte takes.

    Attributes:
        hashing: seconds to hash it, where all processors share the work.
        writing: seconds until it is safely on the disk.
    """

    hashing: float
    writing: float


def measure_file_speed(folder: Path, clock: Callable[[], float] = time.perf_counter) -> FileSpeed:
    """Hash and write a sample; takes a fraction of a second.

    Args:
        folder: an existing folder on the disk of the output.
        clock: returns seconds since some point in time.

    Raises:
        STFError: nothing can be written there.
    """
    sample = os.urandom(2**20) * (SAMPLE // 2**20)
    started = clock()
    hashlib.sha256(sample).digest()
    hashed = clock()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(sample)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise STFError(f"{folder}: cannot be written: {error.strerror}") from error
    written = clock()
    processors = os.cpu_count() or 1
    return FileSpeed((hashed - started) / SAMPLE / processors, (written - hashed) / SAMPLE)
