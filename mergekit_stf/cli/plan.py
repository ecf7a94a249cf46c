"""``mergekit-stf plan``: check a recipe and say what its merge will take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from pydantic import BaseModel

from mergekit_stf.cli.common.terminal import echo, echo_json
from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.copies import copy_adapters, plan_adapters_as_bases
from mergekit_stf.host.architectures.all_weights import check_quantised
from mergekit_stf.host.architectures.coverage import suspend_guard
from mergekit_stf.host.checkpoints.inputs import input_models
from mergekit_stf.host.planning.estimate import Estimate, count_by_rule, estimate_merge
from mergekit_stf.host.planning.planned import PlannedWeight, plan_weights
from mergekit_stf.host.planning.preflight import format_bytes, preflight
from mergekit_stf.host.planning.probe import Probe, probe_models
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.recipe.recipe import load_recipe
from mergekit_stf.host.store.store import Store
from mergekit_stf.report.sample import spread

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
        probe: what a sample of the weights says, None unless asked for.
        warnings: what is legal but probably not meant.
    """

    recipe: str
    models: list[str]
    rules: list[RuleRow]
    costliest: list[CostRow]
    estimate: Estimate
    probe: Probe | None
    warnings: list[str]


@click.command("plan", cls=PrettyPrintHelp)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("merged"),
    show_default=True,
    help="Where the merge would go; its disk is checked and timed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--probe",
    "sample",
    is_flag=False,
    flag_value=24,
    default=0,
    type=click.IntRange(min=0),
    metavar="[N]",
    help="Read about N weights (24 if no N is given) and look for near-duplicate models, task "
    "vectors of very different length, models that hardly differ from the base, and precision "
    "that dtype loses.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 on a warning too, for CI.")
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    as_json: bool,
    sample: int,
    strict: bool,
) -> None:
    """Check the recipe CONFIG and estimate what merging it takes, without reading weights.

    Everything that mergekit-stf merge checks before it starts is checked here. The time
    comes from merging random weights of the recipe's shapes for two seconds on this device.

    Exits with 0 when the recipe can be merged and with 1 when it cannot, with one line on every
    problem.

    \b
    Examples:
      mergekit-stf plan config.yml
      mergekit-stf plan config.yml --probe
      mergekit-stf plan config.yml --json --strict
    """
    merge_options.apply_global_options()
    plan = make_plan(config_file, out, merge_options, sample)
    if as_json:
        echo_json(plan)
    else:
        for line in _lines(plan):
            echo(line)
    if strict and plan.warnings:
        raise click.exceptions.Exit(1)


def make_plan(config_file: Path, out: Path, options: MergeOptions, sample: int) -> Plan:
    """Check a recipe and plan its merge."""
    recipe = load_recipe(config_file)
    if not methods.is_known(recipe.config.merge_method):
        raise STFError(
            f"{config_file}: merge_method is {recipe.config.merge_method!r}; plan knows "
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
        estimated = estimate_merge(weights, options, Path(scratch))
        probed = probe_models(_sampled(weights, sample)) if sample else None
    return Plan(
        recipe=str(config_file),
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


def _sampled(weights: Sequence[PlannedWeight], count: int) -> list[PlannedWeight]:
    linear = {weight.name: weight for weight in weights if weight.is_maps}
    return [linear[name] for name in spread(list(linear), count)]


def _lines(plan: Plan) -> Iterator[str]:
    yield from (f"Warning: {line}" for line in plan.warnings)
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
    if plan.probe is not None:
        yield from _probe_lines(plan.probe)


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
