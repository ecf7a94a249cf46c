"""Bounds of the error hold over seeds and kernels, not only for one seed on a lucky processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["", "AVX2", "COMPATIBLE"])
def test_every_route_keeps_its_bound(kernels: str) -> None:
    """With MKL's own choice for this processor, and with its kernels for others."""
    environment = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    if kernels:
        environment["MKL_CBWR"] = kernels
    told = subprocess.run(
        [sys.executable, "-m", "tests.core.kernels"],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    found = json.loads(told)
    assert len(found) > 100
    assert [case for case in found if not case[2] <= case[3]] == []
