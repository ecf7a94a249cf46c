"""Imports point from ``cli`` to ``host`` to ``core``, and each package imports only what it may."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments import ROOT

PACKAGE = ROOT / "mergekit_stf"
LAYERS = ["core", "host", "demo", "report", "sweep", "cli"]
OURS = "mergekit_stf"


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            yield module
            if module.split(".")[0] == OURS:
                yield from (f"{module}.{name.name}" for name in node.names)


def edges() -> Iterator[tuple[Path, str]]:
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            yield path.relative_to(PACKAGE), name


def layer(name: str) -> str | None:
    """Return the package of ours that a module belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == OURS and len(parts) > 1 and parts[1] in LAYERS else None


def test_every_file_is_seen() -> None:
    assert {path.parts[0] for path, _ in edges() if len(path.parts) > 1} == set(LAYERS)
    names = set(imported(PACKAGE / "host" / "__init__.py"))
    assert "mergekit.merge_methods" in names
    assert "mergekit_stf.host.plugin.method" in set(
        imported(PACKAGE / "host" / "plugin" / "autoload.py")
    )


@pytest.mark.parametrize(("lower", "upper"), [("core", "host"), ("core", "cli"), ("host", "cli")])
def test_no_arrow_points_up(lower: str, upper: str) -> None:
    upward = [(str(p), n) for p, n in edges() if p.parts[0] == lower and layer(n) == upper]
    assert upward == []


def test_the_core_imports_torch_and_the_standard_library() -> None:
    allowed = {"torch", OURS, *sys.stdlib_module_names}
    foreign = [
        (str(path), name)
        for path, name in edges()
        if path.parts[0] == "core" and name.split(".")[0] not in allowed
    ]
    assert foreign == []


def test_only_the_host_package_imports_mergekit() -> None:
    importers = {path.parts[0] for path, name in edges() if name.split(".")[0] == "mergekit"}
    assert importers == {"host"}


def test_the_package_itself_imports_the_hook_alone() -> None:
    assert set(imported(PACKAGE / "__init__.py")) == {"_mergekit_stf_autoload"}


def test_no_file_prints_outside_the_command_line() -> None:
    printing = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "cli" not in path.parts
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []
