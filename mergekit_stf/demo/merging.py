"""Write one recipe a method and merge it through the real ``mergekit-yaml``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.4},
    "ties": {"lambda": 1.0, "density": 0.2},
    "stf": {"lambda": 1.0, "density": 0.2},
}
"""The methods of the demo in the order of its table, each with its global parameters.

``lambda`` is each method's best on validation text, at density 0.2 where a method trims.
"""


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of ``mergekit-yaml``: no look at the Hub, and one thread, as the models were trained."""


def recipe(method: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the recipe that merges the specialists of these kinds, paths relative to the demo.

    The paths start with ``./``: mergekit asks the Hub about a relative path with fewer slashes.
    """
    models = [{"model": f"./models/{kind}", "parameters": {"weight": 1.0}} for kind in kinds]
    written: dict[str, Any] = {"merge_method": method}
    if method != "linear":
        written["base_model"] = "./models/base"
    return {**written, "models": models, "parameters": METHODS[method], "dtype": "float32"}


def write_recipe(root: Path, method: str, kinds: tuple[str, ...]) -> Path:
    """Write ``recipes/METHOD.yml`` under the demo's directory and return its path."""
    path = root / "recipes" / f"{method}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {key: value for key, value in recipe(method, kinds).items() if value != {}}
    header = f"# From the demo's directory: mergekit-yaml recipes/{method}.yml merged/{method}\n"
    path.write_text(header + yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return path


def mergekit_yaml() -> list[str]:
    """Return the start of a command line that runs this environment's ``mergekit-yaml``."""
    beside = shutil.which("mergekit-yaml", path=sysconfig.get_path("scripts"))
    found = beside or shutil.which("mergekit-yaml")
    return [found] if found else [sys.executable, "-m", "mergekit.scripts.run_yaml"]


def run_mergekit_yaml(root: Path, method: str) -> Path:
    """Merge ``recipes/METHOD.yml`` to ``merged/METHOD``, which appears whole or not at all.

    Raises:
        STFError: the command failed; the message ends with what it printed last.
    """
    partial = root / "merged" / f"{method}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [*mergekit_yaml(), f"recipes/{method}.yml", str(partial.relative_to(root)), "--quiet"]
    run = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        end = " / ".join((run.stderr or run.stdout).strip().splitlines()[-3:])
        raise STFError(f"`{' '.join(command)}` in {root} ended with {run.returncode}: {end}")
    merged = root / "merged" / method
    os.replace(partial, merged)
    return merged
