"""``mergekit-stf plan``: check a recipe and say what its merge will take."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_stf.cli.common.ray_option import add_ray_option, look_at_cluster
from mergekit_stf.cli.common.terminal import echo, echo_json
from mergekit_stf.host.planning.plan import make_plan
from mergekit_stf.host.planning.schedule import estimate_cluster
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.recipe.recipe import load_recipe


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
@add_ray_option
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    as_json: bool,
    sample: int,
    strict: bool,
    ray_address: str | None,
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
    with look_at_cluster(ray_address, merge_options) as cluster:
        plan = make_plan(load_recipe(config_file), out, merge_options, sample)
    if cluster is not None:
        estimated = estimate_cluster(plan.estimate, cluster)
        plan = plan.model_copy(update={"cluster": estimated})
    if as_json:
        echo_json(plan)
    else:
        for line in plan.lines():
            echo(line)
    if strict and plan.warnings:
        raise click.exceptions.Exit(1)
