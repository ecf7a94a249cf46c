from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mergekit_stf import __version__
from mergekit_stf.core.features import choose_route
from mergekit_stf.host.plugin import health
from tests.cli.merges import run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SECONDS", 0.01)


def test_versions_and_routes_are_those_of_the_installation() -> None:
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["mergekit-stf"] == __version__
    assert found["registered"]
    (cpu, *_) = found["devices"]
    assert cpu["name"] == "cpu"
    assert cpu["routes"]["bfloat16"] == choose_route(torch.ones(1, 1), torch.bfloat16)
    assert cpu["routes"]["float64"] == choose_route(torch.ones(1, 1).double(), torch.float64)


def test_rates_are_measured() -> None:
    assert health._rate(torch.device("cpu"), torch.float32) > 0.1


def test_the_page_names_every_package() -> None:
    page = run("doctor").stdout
    assert all(package in page for package in health.PACKAGES)
    assert "GFLOP/s" in page


def test_a_healthy_installation_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_armed_at_start", lambda: True)
    done = run("doctor")
    assert done.exit_code == 0
    assert done.stdout.endswith("No problem found.\n")


@pytest.mark.parametrize(
    ("switch", "files", "expected"),
    [
        ("0", ["hook.pth"], "MERGEKIT_STF_AUTOLOAD=0 hides our methods"),
        ("1", [], "no start-up file is installed"),
        ("1", ["hook.pth"], "hook.pth does not run at start-up"),
    ],
)
def test_an_autoload_that_is_not_live_ends_with_1_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, switch: str, files: list[str], expected: str
) -> None:
    monkeypatch.setattr(health, "_armed_at_start", lambda: False)
    monkeypatch.setattr(health, "_hook_files", lambda: map(Path, files))
    monkeypatch.setenv(health.SWITCH, switch)
    done = run("doctor")
    assert done.exit_code == 1
    assert f"problem: {expected}" in done.stdout
    assert "use mergekit-stf merge" in done.stdout


def test_the_tables_in_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch, told in (("1", "ours beside mergekit's"), ("0", "mergekit's alone")):
        monkeypatch.setenv("MERGEKIT_STF_TABLES", switch)
        assert f"architecture tables    {told}\n" in run("doctor").stdout
        assert json.loads(run("doctor", "--json").stdout)["tables"] is (switch == "1")


def test_a_host_of_another_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "installed_host", lambda: "0.1.4")
    done = run("doctor")
    assert done.exit_code == 1
    assert "mergekit 0.1.4 is installed: pip install 'mergekit>=0.1.5,<0.2'" in done.stdout


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name)
    )
    assert "missing: jinja2, for mergekit-stf report: pip install" in run("doctor").stdout


def test_a_fresh_interpreter_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(health.SWITCH, "0")
    assert not health._armed_at_start()
