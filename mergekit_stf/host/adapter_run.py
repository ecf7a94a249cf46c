"""From a recipe of adapters to a folder that holds the merged model or the merged adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_stf.host.adapter_file import Module, write_adapter
from mergekit_stf.host.adapter_merge import AdapterMerger
from mergekit_stf.host.adapter_model import write_model
from mergekit_stf.host.adapter_plan import plan_adapters
from mergekit_stf.host.finished import HOST_RECIPE
from mergekit_stf.host.recipe import Recipe
from mergekit_stf.host.workspace import Workspace


@dataclass(frozen=True)
class AdapterMerge:
    """What a merge of adapters did.

    Attributes:
        adapters: how many were merged.
        weights: how many weights of the base they change.
        modules: those of the written adapter, none for a full model.
        damped: the weights whose adapters ask for contradicting responses to nearly the same
            features, which were damped, and the pairs of adapters that are near-duplicates there.
    """

    adapters: int
    weights: int
    modules: tuple[Module, ...]
    damped: dict[str, list[tuple[str, str]]]


def merge_to_model(
    recipe: Recipe, out: Path, options: MergeOptions, force: bool = False
) -> AdapterMerge:
    """Merge the adapters of a recipe into their base, and write a full model.

    Args:
        recipe: ``merge_method: stf`` over models ``base+adapter``.
        out: the output directory; it appears when it is complete.
        options: the host's.
        force: replace an output that is there.

    Raises:
        STFError: the recipe, an adapter or ``out`` is not what it must be.
    """
    with Workspace(out, force) as work:
        merger = AdapterMerger(plan_adapters(recipe.config, options))
        write_model(merger, recipe.config, options, work.output)
        _write_recipe(recipe, work.output)
        work.publish()
    return _outcome(merger, [])


def merge_to_adapter(
    recipe: Recipe,
    out: Path,
    options: MergeOptions,
    max_rank: int | None = None,
    force: bool = False,
) -> AdapterMerge:
    """Merge the adapters of a recipe into one adapter.

    The base's weights are read only where an adapter stores a whole weight.

    Args:
        recipe: ``merge_method: stf`` over models ``base+adapter``.
        out: the output directory; it appears when it is complete.
        options: the host's.
        max_rank: truncate to this rank; without it the rank is the sum of the adapters' ranks.
        force: replace an output that is there.

    Raises:
        STFError: as `merge_to_model`, or a weight that no adapter of that rank can hold.
    """
    with Workspace(out, force) as work:
        merger = AdapterMerger(plan_adapters(recipe.config, options))
        modules = write_adapter(merger, recipe.config, work.output, max_rank)
        _write_recipe(recipe, work.output)
        work.publish()
    return _outcome(merger, modules)


def _outcome(merger: AdapterMerger, modules: list[Module]) -> AdapterMerge:
    plan = merger.plan
    return AdapterMerge(len(plan.adapters), len(plan.touched), tuple(modules), merger.damped)


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    (folder / HOST_RECIPE).write_text(recipe.text, encoding="utf-8")
