"""The whole demo: train, merge, measure; the figures go into ``results.json``."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel

from mergekit_stf.core.errors import STFError
from mergekit_stf.demo.corpus import Split
from mergekit_stf.demo.merging import METHODS, MergekitYaml, write_recipe
from mergekit_stf.demo.models import build_models, load_model
from mergekit_stf.demo.training import Advance, Settings, bits_per_byte, torch_threads

MARK = ".mergekit-stf-demo"
"""The name of an empty file by which a directory is known to be a demo's."""
MERGE_STEPS = 10
"""Optimiser steps that take about as long as one merge, for the progress bar."""
MEASURE_STEPS = 10
"""The same for measuring one model."""


class Results(BaseModel):
    """What the demo measured.

    Attributes:
        seed: of weights and text order.
        settings: of sizes and training.
        parameters: of the merges, by method.
        bits_per_byte: held-out loss by model and kind of text.
        seconds: spent on training, on each merge by ``mergekit-yaml`` after its imports, and on
            the whole.
        versions: of the packages that the figures depend on.
    """

    seed: int
    settings: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    bits_per_byte: dict[str, dict[str, float]]
    seconds: dict[str, float]
    versions: dict[str, str]

    def kept_gains(self) -> dict[str, float]:
        """Return the share of the specialists' gains that each merge keeps, mean over the kinds.

        The gain on a kind of text is what its specialist predicts it better than the base, in bits;
        the base keeps 0, and a model as good as each specialist on its text keeps 1.
        """
        losses, kinds = self.bits_per_byte, list(self.settings["kinds"])

        def share(method: str, kind: str) -> float:
            gain = losses["base"][kind] - losses[kind][kind]
            return (losses["base"][kind] - losses[method][kind]) / gain

        return {m: sum(share(m, kind) for kind in kinds) / len(kinds) for m in self.parameters}

    def beaten_specialists(self) -> list[str]:
        """Return the kinds whose specialist is not the best unmerged model on its own text."""
        kinds = list(self.settings["kinds"])
        losses = self.bits_per_byte
        return [
            kind
            for kind in kinds
            if any(losses[kind][kind] >= losses[m][kind] for m in ("base", *kinds) if m != kind)
        ]


def clear(root: Path) -> None:
    """Remove what an earlier demo wrote in a directory, and nothing else.

    Raises:
        STFError: there is something by a name that the demo needs, and no demo has been here.
    """
    found = [path for path in _own_paths(root) if os.path.lexists(path)]
    if found and not (root / MARK).exists():
        raise STFError(
            f"{found[0]} was not written by a demo, so --force leaves it alone; "
            "name another directory"
        )
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _own_paths(root: Path) -> Iterator[Path]:
    for folder, names in (("models", ("base", *Settings().kinds)), ("merged", tuple(METHODS))):
        for name in names:
            yield from (root / folder / name, root / folder / f"{name}.partial")
    yield from (root / "recipes" / f"{method}.yml" for method in METHODS)
    yield root / "results.json"


def total_steps(settings: Settings) -> int:
    """Return how often ``run_demo`` advances in all."""
    models = 1 + len(settings.kinds) + len(METHODS)
    return settings.steps + MERGE_STEPS * len(METHODS) + MEASURE_STEPS * models


def run_demo(root: Path, settings: Settings, seed: int, advance: Advance) -> Results:
    """Train, merge by every method, measure every model on every kind of text, write the figures.

    Raises:
        STFError: this Python does not carry the text, or ``mergekit-yaml`` failed.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with _timed(seconds, "training"):
        paths = build_models(root / "models", settings, seed, advance)
    for method in METHODS:
        write_recipe(root, method, settings.kinds)
    losses = {}
    with MergekitYaml(root, list(METHODS)) as merging:
        for name, path in paths.items():
            losses[name] = model_losses(path, settings, "test")
            advance("measuring", MEASURE_STEPS)
        advance("merging", 0)
        for method, seconds[method] in merging.finished():
            losses[method] = model_losses(root / "merged" / method, settings, "test")
            advance("merging", MERGE_STEPS + MEASURE_STEPS)
    seconds["whole"] = round(time.perf_counter() - start, 2)
    results = Results(
        seed=seed,
        settings=dataclasses.asdict(settings),
        parameters=METHODS,
        bits_per_byte=losses,
        seconds=seconds,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    (root / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return results


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def model_losses(path: Path, settings: Settings, split: Split) -> dict[str, float]:
    """Return the bits per byte of a checkpoint on each kind of text of a split."""
    model = load_model(path)
    with torch_threads(settings.threads):
        return {kind: bits_per_byte(model, kind, settings, split) for kind in settings.kinds}
