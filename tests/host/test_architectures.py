from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.merging import merge, recipe, worst_error
from tests.host.models import FAMILIES, Checkpoints, save_family


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoints:
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_family_merges_through_mergekit_yaml_and_meets_the_oracle(
    checkpoints: Checkpoints, density: float, tmp_path: Path
) -> None:
    merge(recipe(checkpoints, density), tmp_path / "out")
    error, name = worst_error(checkpoints, tmp_path / "out", density)
    assert error < 1e-5, name
