"""``mergekit-stf merge``: checks first, resumes after a crash, and writes a lock file."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_stf.cli.common.out_folder import OutFolder
from mergekit_stf.cli.common.ray_option import add_ray_option, open_executor
from mergekit_stf.cli.common.store_options import add_store_options
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.host.plugin.options import MergeOptions, PrettyPrintHelp, add_merge_options
from mergekit_stf.host.provenance.lock import FILE_NAME
from mergekit_stf.host.recipe.recipe import load_recipe
from mergekit_stf.host.run.merge import StoreOptions, merge_recipe


@click.command("merge", cls=PrettyPrintHelp)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out_path", metavar="OUT", type=OutFolder())
@click.option("--force", is_flag=True, help="Replace OUT if an earlier merge wrote it.")
@add_store_options
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep merged matrices in this folder, for several merges.  [default: beside OUT]",
)
@add_ray_option
@add_merge_options  # type: ignore[untyped-decorator]
def command(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    force: bool,
    keep_store: bool,
    store: Path | None,
    store_size: int,
    ray_address: str | None,
) -> None:
    """Merge the recipe CONFIG into the folder OUT, which is then complete or absent.

    The recipe, the files, the shapes, the disk and the memory are checked first. What a killed
    merge has finished is found again by the same command.
    """
    recipe = load_recipe(config_file)
    merge_options.apply_global_options()
    for warning in recipe.warnings:
        echo(f"Warning: {recipe.source}: {warning}", err=True)
    wanted = StoreOptions(store, store_size, keep_store)
    with open_executor(ray_address, merge_options) as runs:
        merged = merge_recipe(recipe, out_path, merge_options, wanted, force, executor=runs)
    if not merge_options.quiet:
        echo(merged.store)
        echo(f"{out_path}: {len(merged.lock.outputs)} files, listed in {FILE_NAME}")
        if merged.lock.check:
            echo(f"{out_path}: {merged.lock.check.summary}")
