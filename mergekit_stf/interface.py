"""What notebooks and scripts may rely on; ``docs/python.md`` is its page.

Everything here can be imported from ``mergekit_stf`` itself, which loads it, and torch and mergekit
with it, when it is first asked for. All other modules are internal and may change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.planning.plan import Plan, make_plan
from mergekit_stf.host.plugin.method import register_with_mergekit
from mergekit_stf.host.plugin.options import options_from
from mergekit_stf.host.recipe.recipe import Recipe, check_recipe, load_recipe
from mergekit_stf.host.run.in_memory import merge_weights
from mergekit_stf.host.run.merge import merge_recipe

__all__ = ["Plan", "STFError", "merge", "merge_weights", "plan"]

LOG = logging.getLogger("mergekit_stf")


def plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] = "merged",
    *,
    probe: int = 0,
    **options: Any,
) -> Plan:
    """Check a recipe and say what its merge will take, without reading weights.

    This is ``mergekit-stf plan``; ``print(plan(...))`` shows what the command prints.

    Args:
        recipe: the path of a recipe, or a mapping with its keys.
        out: where the merge would go; its disk is checked and timed.
        probe: about how many weights to read all the same, for a look at the models; 0 reads none.
        options: of mergekit, as its command line has them: ``device="cuda"``.

    Returns:
        Weights and parameters by rule, the costliest weights, the estimate, warnings.

    Raises:
        STFError: the recipe cannot be merged; the message says why, and what to do.
    """
    return make_plan(_recipe(recipe), Path(out), options_from(options), probe)


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    **options: Any,
) -> Path:
    """Merge a recipe into a folder, which is then complete or absent.

    This is ``mergekit-stf merge``: everything is checked first, the same call goes on where a
    killed one was, and the folder gets a lock file for ``mergekit-stf verify``. Warnings go to the
    logger ``mergekit_stf``.

    Args:
        recipe: the path of a recipe, or a mapping with its keys.
        out: the folder to write.
        force: replace an earlier merge in it.
        options: of mergekit, as its command line has them: ``device="cuda"``.

    Returns:
        The folder, an ordinary checkpoint: ``AutoModel.from_pretrained(folder)`` reads it.

    Raises:
        STFError: whatever is wrong, before or during the merge; ``out`` is then as it was.
    """
    checked, folder = _recipe(recipe), Path(out)
    for warning in checked.warnings:
        LOG.warning("%s: %s", checked.source, warning)
    merge_recipe(checked, folder, options_from(options), force=force)
    return folder


def _recipe(given: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    register_with_mergekit()
    if isinstance(given, Mapping):
        return check_recipe(yaml.safe_dump(dict(given), sort_keys=False))
    return load_recipe(os.fspath(given))
