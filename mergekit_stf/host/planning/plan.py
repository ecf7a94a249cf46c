"""What merging a recipe will take, as one value: ``mergekit-stf plan`` prints it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.copies import copy_adapters, plan_adapters_as_bases
from mergekit_stf.host.architectures.all_weights import check_quantised
from mergekit_stf.host.architectures.coverage import suspend_guard
from mergekit_stf.host.checkpoints.inputs import input_models
from mergekit_stf.host.diagnostics.sample import spread
from mergekit_stf.host.planning.estimate import Estimate, count_by_rule, estimate_merge
from mergekit_stf.host.planning.file_speed import measure_file_speed
from mergekit_stf.host.planning.planned import PlannedWeight, plan_weights
from mergekit_stf.host.planning.preflight import format_bytes, preflight
from mergekit_stf.host.planning.probe import Probe, probe_models
from mergekit_stf.host.planning.schedule import ClusterEstimate
from mergekit_stf.host.recipe.recipe import Recipe
from mergekit_stf.host.run.network import heed_offline_mode
from mergekit_stf.host.store.store import Store
from mergekit_stf.text import printable

COSTLIEST = 5


class RuleRow(BaseModel):
    """How many weights and parameters a rule merges."""

    rule: str
    weights: int
    parameters: int


class CostRow(BaseModel):
    """Weights that cost the same: one of them, their shape, seconds each, how many."""

    name: str
    shape: list[int]
    seconds: float
    weights: int


class Plan(BaseModel):
    """What ``mergekit-stf plan --json`` prints.

    Attributes:
        recipe: its file.
        models: the tuned models.
        rules: weights and parameters by rule.
        costliest: the weights that cost most, those of one kind together.
        estimate: time, memory and disk.
        cluster: time on a cluster, None unless asked for.
        probe: what a sample of the weights says, None unless asked for.
        warnings: what is legal but probably not meant.
    """

    recipe: str
    models: list[str]
    rules: list[RuleRow]
    costliest: list[CostRow]
    estimate: Estimate
    cluster: ClusterEstimate | None = None
    probe: Probe | None
    warnings: list[str]

    def lines(self) -> list[str]:
        """Return what ``mergekit-stf plan`` prints, line by line."""
        return [*(f"Warning: {line}" for line in self.warnings), *self.figures()]

    def figures(self) -> list[str]:
        """Return the lines without the warnings."""
        return list(_figures(self))

    def __str__(self) -> str:
        """Return all lines as one text."""
        return "\n".join(map(printable, self.lines()))


@heed_offline_mode()
def make_plan(recipe: Recipe, out: Path, options: MergeOptions, sample: int = 0) -> Plan:
    """Check a recipe and say what its merge will take, without reading weights.

    Args:
        recipe: a checked recipe of a method of ours.
        out: where the merge would go; its disk is checked and timed.
        options: the host's.
        sample: about how many weights to read all the same, for a look at the models.

    Raises:
        STFError: the recipe cannot be merged.
    """
    if not methods.is_known(recipe.config.merge_method):
        raise STFError(
            f"{recipe.source}: merge_method is {recipe.config.merge_method!r}; plan knows "
            f"{', '.join(methods.names())}"
        )
    folder = _existing(out.absolute().parent)
    input_models(recipe.config, options)
    check_quantised(recipe.config, options)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stf-plan-") as scratch:
        if sample:
            copy_adapters(recipe.config, options, Path(options.lora_merge_cache or scratch))
        else:
            plan_adapters_as_bases(recipe.config, options)
        checks = preflight(recipe.config, options, folder, Store(Path(scratch) / "store"))
        with suspend_guard():  # the preflight has checked it
            weights = plan_weights(recipe.config, options)
        estimated = estimate_merge(weights, options, measure_file_speed(Path(scratch)))
        probed = probe_models(_choose_sample(weights, sample)) if sample else None
    return Plan(
        recipe=recipe.source,
        models=sorted({str(model) for weight in weights for model in weight.models}),
        rules=[
            RuleRow(rule=rule, weights=count, parameters=numbers)
            for rule, (count, numbers) in count_by_rule(weights).items()
        ],
        costliest=_costliest(weights, estimated),
        estimate=estimated,
        probe=probed,
        warnings=[*recipe.warnings, *checks, *(probed.warnings if probed else ())],
    )


def _costliest(weights: Sequence[PlannedWeight], estimated: Estimate) -> list[CostRow]:
    rows: dict[tuple[float, tuple[int, ...]], CostRow] = {}
    for weight in weights:
        shape, seconds = list(weight.header.shape), estimated.by_weight[weight.name]
        new = CostRow(name=weight.name, shape=shape, seconds=seconds, weights=0)
        rows.setdefault((seconds, tuple(shape)), new).weights += 1
    return sorted(rows.values(), key=lambda row: -row.seconds * row.weights)[:COSTLIEST]


def _existing(folder: Path) -> Path:
    return folder if folder.is_dir() else _existing(folder.parent)


def _choose_sample(weights: Sequence[PlannedWeight], count: int) -> list[PlannedWeight]:
    linear = {weight.name: weight for weight in weights if weight.is_maps}
    return [linear[name] for name in spread(list(linear), count)]


def _figures(plan: Plan) -> Iterator[str]:
    yield f"{'rule':<12}{'weights':>9}{'parameters':>16}"
    for row in plan.rules:
        yield f"{row.rule:<12}{row.weights:>9,}{row.parameters:>16,}"
    found = plan.estimate
    yield ""
    yield "costliest weights"
    for cost in plan.costliest:
        shape = " × ".join(map(str, cost.shape))
        each = f"{cost.weights} × {format_duration(cost.seconds)}"
        yield f"  {each:>14}  {shape:<16}{cost.name}{', …' if cost.weights > 1 else ''}"
    yield ""
    yield f"time      {format_duration(found.seconds)} on {found.device}"
    yield (
        f"          {format_duration(found.starting)} starting and checking, "
        f"{format_duration(found.merging)} merging, {format_duration(found.files)} files"
    )
    own, mapped = format_bytes(found.memory - found.mapped), format_bytes(found.mapped)
    yield f"memory    {own} at peak, and up to {mapped} of mapped inputs"
    if found.device_memory:
        yield f"device    {format_bytes(found.device_memory)} at peak"
    output, store = format_bytes(found.output), format_bytes(found.store)
    yield f"disk      {output} output, {store} store while merging"
    if plan.cluster is not None:
        yield from _cluster_lines(plan.cluster)
    if plan.probe is not None:
        yield from _probe_lines(plan.probe)


def _cluster_lines(found: ClusterEstimate) -> Iterator[str]:
    each = f"{found.threads} thread{'s' if found.threads > 1 else ''} each"
    yield (
        f"cluster   {format_duration(found.seconds)} with {found.places} weights at a time "
        f"({each}) on {', '.join(found.nodes)}"
    )
    others = (f"{number}: {format_duration(time)}" for number, time in found.by_places.items())
    yield f"          weights at a time: {', '.join(others)}"


def _probe_lines(found: Probe) -> Iterator[str]:
    yield ""
    yield f"probe of {found.sampled} weights"
    yield f"  {'norm':>10}{'zeros':>8}{'rounded off':>13}  model"
    for model in found.models:
        yield f"  {model.norm:>10.4g}{model.zeros:>8.1%}{model.lost:>13.2%}  {model.model}"
    for pair in found.pairs:
        yield f"  cosine {pair.cosine:+.3f}  {pair.models[0]} and {pair.models[1]}"


def format_duration(seconds: float) -> str:
    """Write a time for a reader: ``0.25 s``, ``12 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
