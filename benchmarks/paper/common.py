"""Models, merges and scores that every question of ``benchmarks/paper`` shares."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaForCausalLM

from mergekit_stf.core import trim
from mergekit_stf.core.methods import Kind
from mergekit_stf.demo.corpus import Split
from mergekit_stf.demo.models import load_model, save_model
from mergekit_stf.demo.texts import KINDS
from mergekit_stf.demo.training import (
    Settings,
    bits_per_byte,
    torch_threads,
    train_base,
    train_specialist,
)
from mergekit_stf.host.merging.kinds import kind_for

StateDict = dict[str, torch.Tensor]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "paper"
SETTINGS = dataclasses.replace(Settings(), kinds=tuple(KINDS))
WINDOWS: dict[Split, int] = {"train": 0, "validation": 32, "test": 96}
LAMBDAS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclasses.dataclass
class Study:
    """A base and its specialists of one seed.

    Attributes:
        seed: of base and specialists.
        base: weights of the base.
        tuned: weights of each specialist by kind of text.
        model: takes weights to be measured.
        floor: loss of the base and of each specialist on its own kind, by split.
    """

    seed: int
    base: StateDict
    tuned: dict[str, StateDict]
    model: LlamaForCausalLM
    floor: dict[str, dict[str, tuple[float, float]]]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.tuned)

    def losses(self, weights: StateDict, kinds: Iterable[str], split: Split) -> dict[str, float]:
        """Return bits per byte of a set of weights by kind of text."""
        self.model.load_state_dict(weights)
        settings = dataclasses.replace(SETTINGS, windows=WINDOWS[split])
        return {kind: bits_per_byte(self.model, kind, settings, split) for kind in kinds}

    def score(self, weights: StateDict, kinds: Iterable[str], split: Split) -> dict[str, Any]:
        """Return losses, their mean, and the share of the specialists' gain that is kept."""
        losses = self.losses(weights, kinds, split)
        reference = {kind: self.floor[split][kind] for kind in losses}
        gained = sum(reference[kind][0] - loss for kind, loss in losses.items())
        possible = sum(before - after for before, after in reference.values())
        mean = statistics.fmean(losses.values())
        return {"losses": losses, "mean": mean, "kept": gained / possible}


def trained(seed: int, models: Path, settings: Settings) -> dict[str, Path]:
    """Return the checkpoints of a seed, trained first if they are not there."""
    directory = models / f"seed-{seed}"
    paths = {kind: directory / f"rehearsal-{settings.rehearsal}" / kind for kind in settings.kinds}
    with torch_threads(settings.threads), tqdm(total=settings.steps, desc=f"seed {seed}") as bar:

        def advance(_: str, steps: int) -> None:
            bar.update(steps)

        if not (directory / "base").exists():
            save_model(train_base(settings, seed, advance), directory / "base")
        base = load_model(directory / "base")
        for kind, path in paths.items():
            if not path.exists():
                save_model(train_specialist(base, kind, settings, seed, advance), path)
    return {"base": directory / "base", **paths}


def load_study(seed: int, models: Path, settings: Settings = SETTINGS) -> Study:
    """Read the models of a seed and measure them."""
    paths = trained(seed, models, settings)
    weights = {name: load_file(path / "model.safetensors") for name, path in paths.items()}
    base = weights.pop("base")
    study = Study(seed, base, weights, load_model(paths["base"]), {})
    for split in ("validation", "test"):
        before = study.losses(base, SETTINGS.kinds, split)
        study.floor[split] = {
            kind: (before[kind], study.losses(study.tuned[kind], [kind], split)[kind])
            for kind in SETTINGS.kinds
        }
    return study


@dataclasses.dataclass(frozen=True)
class Change:
    """What a merge adds to the base: ``lambda`` times one part, and normalisation as it is."""

    base: StateDict
    scaled: StateDict
    fixed: StateDict

    def at(self, scale: float) -> StateDict:
        return {
            name: P + (scale * self.scaled[name] if name in self.scaled else self.fixed[name])
            for name, P in self.base.items()
        }


def change(study: Study, method: str, density: float = 1.0, kinds: Iterable[str] = ()) -> Change:
    """Merge once with mergekit at ``lambda`` = 1, so that any other ``lambda`` costs nothing.

    ``trimmed_sum`` is no method of mergekit: task arithmetic on trimmed task vectors, which tells
    what trimming alone does.
    """
    tuned = {kind: study.tuned[kind] for kind in kinds or study.kinds}
    if method == "trimmed_sum":
        total = {
            n: sum(trim(t[n] - P, density) for t in tuned.values()) for n, P in study.base.items()
        }
        return Change(study.base, total, {})
    models = tuned if method == "linear" else {"base": study.base, **tuned}
    parameters: dict[str, float] = {"weight": 1.0}
    if method != "linear":
        parameters["lambda"] = 1.0
    if method in ("ties", "stf"):
        parameters["density"] = density
    base = None if method == "linear" else "base"
    merged = merge_state_dicts(models, method, parameters=parameters, base=base)
    moved = {name: merged[name] - P for name, P in study.base.items()}
    fixed = {n: D for n, D in moved.items() if method == "stf" and is_normalisation(n, D)}
    return Change(study.base, {n: D for n, D in moved.items() if n not in fixed}, fixed)


def is_normalisation(name: str, tensor: torch.Tensor) -> bool:
    return kind_for(name, tensor.shape, None) == Kind.NORMALISATION


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return kind_for(name, tensor.shape, None) == Kind.LINEAR


def check_change(study: Study) -> None:
    """Refuse to go on if scaling a change is not what mergekit makes of the same ``lambda``."""
    for method in ("task_arithmetic", "ties", "stf"):
        parameters = {"weight": 1.0, "lambda": 0.6, "density": 0.5}
        models = {"base": study.base, **study.tuned}
        merged = merge_state_dicts(models, method, parameters=parameters, base="base")
        ours = change(study, method, 0.5).at(0.6)
        for name, expected in merged.items():
            torch.testing.assert_close(
                ours[name], expected, rtol=0, atol=1e-5, msg=f"{method} {name}"
            )


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def read(name: str) -> dict[str, Any]:
    """Return the measurements of a question by seed."""
    seeds: dict[str, Any] = json.loads((RESULTS / f"paper-{name}.json").read_text())["seeds"]
    return seeds


def main(name: str, measure: Callable[[Study], Any]) -> None:
    """Run one question for several seeds and write ``benchmarks/results/paper-NAME.json``.

    The specialists are the demo's, half of whose text is the base's; ``--plain`` takes specialists
    that were tuned on their own text alone, into ``paper-NAME-plain.json``.
    """

    @click.command()
    @click.option("--seeds", default=3, show_default=True)
    @click.option("--models", type=click.Path(path_type=Path), default=ROOT / "build" / "paper")
    @click.option("--threads", default=torch.get_num_threads())
    @click.option("--plain", is_flag=True, help="Tune without rehearsal.")
    def run(seeds: int, models: Path, threads: int, plain: bool) -> None:
        settings = dataclasses.replace(SETTINGS, rehearsal=0) if plain else SETTINGS
        torch.set_num_threads(threads)
        found = {}
        for seed in range(seeds):
            study = load_study(seed, models, settings)
            check_change(study)
            found[seed] = measure(study)
            print(f"{name}: seed {seed} done", flush=True)
        RESULTS.mkdir(exist_ok=True)
        record = {
            "settings": dataclasses.asdict(settings),
            "windows": WINDOWS,
            "machine": f"{platform.machine()}, {threads} threads, torch {torch.__version__}",
            "seeds": found,
        }
        variant = f"{name}-plain" if plain else name
        (RESULTS / f"paper-{variant}.json").write_text(json.dumps(record, indent=1) + "\n")

    run()
