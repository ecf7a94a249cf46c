"""The way of a weight is short: few functions of ours between the host's call and LAPACK's."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors

import mergekit_stf.host
from mergekit_stf.core import pool
from mergekit_stf.demo.training import torch_threads
from mergekit_stf.host.plugin.method import HostMethod

PACKAGE = str(Path(mergekit_stf.host.__file__).parent.parent)
ENTRANCE = HostMethod._execute.__code__
SUBMITTING = pool.map_matrices.__code__


def ours(frame: FrameType | None) -> list[CodeType]:
    """Return the code of our own frames, the innermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code)
        frame = frame.f_back
    return found


def stack() -> list[CodeType]:
    """Return what is on the way from the host's call to the caller of this function.

    In a worker this is the worker's own stack on top of that of the thread that submits to it,
    which may be reading the next matrix meanwhile and then has more frames, that are left out.
    """
    found = ours(sys._getframe())
    main = threading.main_thread()
    if threading.current_thread() is not main:
        submitting = ours(sys._current_frames()[main.ident or 0])
        found += submitting[submitting.index(SUBMITTING) :]
    assert found[-1] is ENTRANCE
    return found


def first_stack(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[CodeType]:
    """Merge a matrix through the host, and return the stack of the first eigendecomposition."""
    stacks: list[list[CodeType]] = []
    eigh = torch.linalg.eigh

    def recorded(*arguments: Any, **options: Any) -> Any:
        stacks.append(stack())
        return eigh(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    torch.manual_seed(0)
    base = torch.randn(48, 32)
    inputs = [base, *(base + 0.1 * torch.randn(48, 32) for _ in range(3))]
    merge_tensors([x.to(dtype) for x in inputs], "stf", base_index=0)
    assert len(stacks) >= 3
    return stacks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "most"),
    [
        (1, 8),
        (2, 9),  # the pool is a step of its own: it takes the matrices and hands them out
    ],
)
def test_few_frames_to_the_first_eigendecomposition(
    monkeypatch: pytest.MonkeyPatch, count: int, most: int, dtype: torch.dtype
) -> None:
    with torch_threads(count):
        found = first_stack(monkeypatch, dtype)
    assert (SUBMITTING in found) is (count > 1)
    assert len(found) <= most, [code.co_name for code in found]
