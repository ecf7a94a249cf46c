from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.environments import build_wheel


def pytest_configure() -> None:
    """Undo what a background job inherits: a SIGINT that is ignored, in us and our children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker is left alone with a long one at the end.

    ``--no-loadscope-reorder`` keeps this order; xdist's own puts files of few tests last, and those
    are the long ones.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", params=["single", "sharded"])
def layout(request: pytest.FixtureRequest) -> str:
    """How the checkpoints of a test are stored, see `tests.host.models.lay_out`."""
    return str(request.param)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))
