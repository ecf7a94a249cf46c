"""One cluster of three nodes for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster import clusters


@pytest.fixture(scope="package")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of hub models on each node of the cluster."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="package")
def three(hub: Path) -> Iterator[Any]:
    """A cluster of three nodes that this process is a member of."""
    with (
        clusters.cluster([{"HF_HUB_CACHE": str(hub)}] * 3) as cluster,
        clusters.member(cluster.address),
    ):
        yield cluster


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A worker has one core, and the merge that it is compared with has one too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
