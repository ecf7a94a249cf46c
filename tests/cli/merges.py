"""Recipes over tiny models, merged through the command line, for the tests of the tools."""

from __future__ import annotations

from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from mergekit_stf.cli.main import main
from tests.host.models import Checkpoints, save_family


def tiny_models(folder: Path, family: str = "llama", layout: str = "single") -> Checkpoints:
    """Write a base and three tuned copies."""
    return save_family(family, folder, layout=layout)


def write_recipe(path: Path, models: Checkpoints, **parameters: object) -> Path:
    """Write the smallest recipe over these models, with global parameters."""
    recipe = {
        "merge_method": "stf",
        "base_model": str(models.base),
        "models": [{"model": str(tuned)} for tuned in models.tuned],
        "parameters": parameters,
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    """Run ``mergekit-stf`` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
