"""How much memory a merge has taken."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch


def peak_rss() -> int:
    """Return the process's memory high-water mark in bytes.

    Linux counts a parent's memory in ``ru_maxrss`` of a child, but not in ``VmHWM``.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device(device: torch.device) -> int | None:
    """Return the most memory ever allocated on an accelerator, None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
