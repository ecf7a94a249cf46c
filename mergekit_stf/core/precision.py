"""Float32 means float32, float64 is taken in portions, bfloat16 where there are units for it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 2**25
"""Entries of a task matrix that are converted to float64 at a time."""

FAR = 30
"""Exponents of the largest entry, of either sign, up to which float32 has room for the squares of
all that counts as a feature, and for sums of them."""

BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")
"""Capabilities with which a product in bfloat16 takes half the time of one in float32, or less."""

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


def far_exponent(M: Tensor) -> int:
    """Return ``e`` with the largest ``|entry|`` of M in ``[2^(e-1), 2^e)``, 0 where ``|e| <= FAR``.

    ``by_power(M, -e)`` has squares that neither overflow nor vanish.
    """
    _, exponent = math.frexp(max(torch.stack(torch.aminmax(M)).abs().tolist()))
    return exponent if abs(exponent) > FAR else 0


def by_power(x: Tensor, exponent: int) -> Tensor:
    """Return ``2^exponent x``, exactly where the type has it; in two steps, as the factor may not.

    Powers of two leave every digit of what is computed as it is.
    """
    first = exponent // 2
    return x * 2.0**first * 2.0 ** (exponent - first) if exponent else x


def length(M: Tensor) -> float:
    """Return the Frobenius norm ``|M|``, whatever the size of the entries."""
    exponent = far_exponent(M)
    return math.ldexp(float(torch.linalg.vector_norm(by_power(M, -exponent))), exponent)


def has_bfloat16(device: torch.device) -> bool:
    """Say whether products in bfloat16 are quicker than in float32: on CPUs with units for them.

    Told by the processor, not by a measurement, so that a machine answers the same way each time.
    Versions of torch that do not ask the processor count as without. Cards are left alone: their
    products in float32 are a small part of a merge.
    """
    if device.type != "cpu":
        return False
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(known.get(unit)) for unit in BFLOAT16_UNITS)


def instructions() -> str:
    """Return the instructions of this CPU that decide the last bits of a merge, for a person."""
    vectors: str = torch.backends.cpu.get_cpu_capability()
    return f"{vectors} and bfloat16" if has_bfloat16(torch.device("cpu")) else vectors


def switches() -> str:
    """Return the settings that choose kernels, and with them the last bits, for a person.

    These are the variables of ``SWITCHES`` and torch's precision of float32 products where it is
    not the default; ``default`` when there are none.
    """
    found = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(SWITCHES) and "VERBOSE" not in name
    ]
    with _lock:
        precision = _outside if _entered else torch.get_float32_matmul_precision()
    if precision != "highest":
        found.append(f"float32 products={precision}")
    return ", ".join(found) or "default"


def processor() -> tuple[str, ...]:
    """Return the name and the features of this CPU, by which libraries choose their kernels."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    features = sorted(name for name, has in known.items() if has is True)
    return (str(known.get("cpu_name", "")), *features)
