"""Write one recipe a method and merge them through the real ``mergekit-yaml``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.4},
    "ties": {"lambda": 1.0, "density": 0.2},
    "stf": {"lambda": 1.0, "density": 0.2},
    "wudi": {},
}
"""The methods of the demo in the order of its table, each with its global parameters.

``lambda`` is each method's best on validation text, at density 0.2 where a method trims; ``wudi``
is as it comes.
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


class MergekitYaml:
    """``mergekit-yaml`` at work on recipes of the demo, in a process beside this one.

    Args:
        root: the demo's directory; ``recipes/METHOD.yml`` is merged to ``merged/METHOD``, which
            appears whole or not at all.
        methods: whose recipes to merge, one after another.
    """

    def __init__(self, root: Path, methods: Sequence[str]) -> None:
        self.root = root
        self.methods = list(methods)

    def __enter__(self) -> MergekitYaml:
        """Start the process."""
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mergekit_stf.demo.console", *self.methods],
            cwd=self.root,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, if it is still at work."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def finished(self) -> Iterator[tuple[str, float]]:
        """Yield each method when its merge is complete, and its seconds.

        Raises:
            STFError: a merge failed; the message ends with what was printed last.
        """
        left = list(self.methods)
        for line in self._process.stdout or ():
            method, seconds = line.split()
            left.remove(method)
            yield method, float(seconds)
        if code := self._process.wait():
            self._said.seek(0)
            end = " / ".join(self._said.read().strip().splitlines()[-3:])
            command = f"mergekit-yaml recipes/{left[0]}.yml"
            raise STFError(f"`{command}` in {self.root} ended with {code}: {end}")
