from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from mergekit_stf import __version__
from mergekit_stf.core.features import choose_route
from mergekit_stf.host.plugin import health
from tests.cli.merges import run


def test_versions_and_routes_are_those_of_the_installation() -> None:
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["mergekit-stf"] == __version__
    assert found["registered"]
    (cpu, *_) = found["devices"]
    assert cpu["name"] == "cpu"
    assert min(cpu["float32"], cpu["float64"]) > 0.1
    assert cpu["routes"]["bfloat16"] == choose_route(torch.ones(1, 1), torch.bfloat16)
    assert cpu["routes"]["float64"] == choose_route(torch.ones(1, 1).double(), torch.float64)


def test_the_page_names_every_package() -> None:
    page = run("doctor").stdout
    assert all(package in page for package in health.PACKAGES)
    assert "GFLOP/s" in page


def test_a_healthy_installation_ends_with_0_and_one_without_its_hook_with_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests run where the package is installed, so a fresh interpreter arms the hook."""
    done = run("doctor")
    assert done.exit_code == 0, done.stdout
    assert done.stdout.endswith("No problem found.\n")
    monkeypatch.setenv(health.SWITCH, "0")
    done = run("doctor")
    assert done.exit_code == 1
    assert "problem: MERGEKIT_STF_AUTOLOAD=0 hides our methods: unset it" in done.stdout


@pytest.mark.parametrize(
    ("switch", "files", "expected"),
    [
        ("0", ["hook.pth"], "MERGEKIT_STF_AUTOLOAD=0 hides our methods"),
        ("1", [], "no start-up file is installed"),
        ("1", ["hook.pth"], "hook.pth does not run at start-up"),
    ],
)
def test_a_hook_that_is_not_armed_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, switch: str, files: list[str], expected: str
) -> None:
    monkeypatch.setenv(health.SWITCH, switch)
    (problem,) = health.find_problems("0.1.5", True, False, files)
    assert problem.startswith(expected)
    assert "use mergekit-stf merge" in problem
    assert not list(health.find_problems("0.1.5", True, True, files))


def test_the_tables_in_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch, told in (("1", "ours beside mergekit's"), ("0", "mergekit's alone")):
        monkeypatch.setenv("MERGEKIT_STF_TABLES", switch)
        assert f"architecture tables    {told}\n" in run("doctor").stdout
        assert json.loads(run("doctor", "--json").stdout)["tables"] is (switch == "1")


def test_a_host_of_another_version_is_a_problem() -> None:
    (problem,) = health.find_problems("0.1.4", True, True, [])
    assert problem == "mergekit 0.1.4 is installed: pip install 'mergekit>=0.1.5,<0.2'"


def test_a_host_that_does_not_know_our_methods_is_a_problem() -> None:
    (problem,) = health.find_problems("0.1.5", False, True, [])
    assert problem.startswith("mergekit does not know our methods: pip install --force-reinstall")


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name)
    )
    assert "missing: jinja2, for mergekit-stf report: pip install" in run("doctor").stdout
