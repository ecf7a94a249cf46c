"""``mergekit-stf lora``: merge LoRA adapters from their factors."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from mergekit_stf.cli.common.out_folder import OutFolder
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.host.lora.adapter_file import total_error
from mergekit_stf.host.plugin.options import MergeOptions, ShardSizeParamType
from mergekit_stf.host.recipe.recipe import load_recipe
from mergekit_stf.host.run.lora import AdapterMerge, merge_to_adapter, merge_to_model


@click.command("lora")
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out_path", metavar="OUT", type=OutFolder())
@click.option("--adapter", is_flag=True, help="Write one adapter in PEFT's format, not a model.")
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    help="With --adapter: truncate to this rank, and print the error.",
)
@click.option(
    "--force", is_flag=True, help="Replace OUT if an earlier merge with a lock file wrote it."
)
@click.option(
    "--lock",
    is_flag=True,
    help="Write a lock file for verify; all inputs and outputs are read once more.",
)
@click.option(
    "--out-shard-size",
    type=ShardSizeParamType(),
    default="5B",
    show_default=True,
    help="Bytes in an output shard.",
)
@click.option("--transformers-cache", help="Where models from the hub are kept.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the base's repository.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress bar and no summary.")
def command(
    config_file: Path,
    out_path: Path,
    adapter: bool,
    max_rank: int | None,
    force: bool,
    lock: bool,
    out_shard_size: int,
    transformers_cache: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Merge the adapters of CONFIG from their factors and write OUT.

    CONFIG is a recipe of mergekit by a method of ours whose models are «base+adapter». OUT gets
    a full model, or with --adapter one adapter. No merged copy of a model is written on the way.
    """
    if max_rank is not None and not adapter:
        raise click.UsageError("--max-rank shortens an adapter; add --adapter")
    logging.basicConfig(level=logging.WARNING)
    options = MergeOptions(
        out_shard_size=out_shard_size,
        transformers_cache=transformers_cache,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    recipe = load_recipe(config_file)
    for warning in recipe.warnings:
        echo(f"warning: {warning}", err=True)
    if adapter:
        merge = merge_to_adapter(recipe, out_path, options, max_rank, force, lock)
    else:
        merge = merge_to_model(recipe, out_path, options, force, lock)
    if not quiet:
        _summarise(merge, out_path)


def _summarise(merge: AdapterMerge, out: Path) -> None:
    what = "model"
    if merge.modules:
        ranks = sorted(module.rank for module in merge.modules)
        span = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else f"{ranks[0]}"
        what = f"adapter of rank {span}"
    echo(f"{out}: {what}, {merge.adapters} adapters merged in {merge.weights} weights")
    if any(module.dropped for module in merge.modules):
        worst = max(merge.modules, key=lambda module: module.error)
        echo(
            f"truncation error {total_error(merge.modules):.2e} of the whole update, "
            f"at worst {worst.error:.2e} in {worst.name} (relative, Frobenius)"
        )
