"""What of this machine decides the last bits of a merge."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

SWITCHES = (
    "ATEN_",
    "MKL_",
    "DNNL_",
    "ONEDNN_",
    "OPENBLAS_",
    "CUBLAS",
    "NVIDIA_TF32",
    "TORCH_ALLOW_TF32",
)
"""Beginnings of the variables with which a user chooses the kernels of torch and its libraries."""


def instructions() -> str:
    """Return the vector instructions of this CPU that torch uses, for a person."""
    vectors: str = torch.backends.cpu.get_cpu_capability()
    return vectors


def switches() -> str:
    """Return the variables of ``SWITCHES`` that are set, ``default`` when there are none."""
    found = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(SWITCHES) and "VERBOSE" not in name
    ]
    return ", ".join(found) or "default"


def processor() -> tuple[str, ...]:
    """Return the name and the features of this CPU, by which libraries choose their kernels."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    features = sorted(name for name, has in known.items() if has is True)
    return (str(known.get("cpu_name", "")), *features)
