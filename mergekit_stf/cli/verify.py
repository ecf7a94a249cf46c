"""``mergekit-stf verify``: is a merge still what its lock file says, and can it be made again?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from mergekit_stf.cli.common.errors import DIFFERENT, Terminated
from mergekit_stf.cli.common.ray_option import add_ray_option, open_executor
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.executors.execution import Executor
from mergekit_stf.host.provenance.lock import FILE_NAME, Lock, read_lock
from mergekit_stf.host.provenance.lock_check import find_differences


@click.command("verify")
@click.argument("out_path", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rebuild", is_flag=True, help="Merge again as well, and compare the bytes.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where to rebuild, with room for the model.  [default: the system's temporary folder]",
)
@add_ray_option
@click.option("--transformers-cache", help="Where hub models are kept.")
@click.option("--trust-remote-code", is_flag=True, help="Rebuild a merge that was made so.")
def command(
    out_path: Path,
    rebuild: bool,
    scratch: Path | None,
    ray_address: str | None,
    transformers_cache: str | None,
    trust_remote_code: bool,
) -> None:
    """Compare inputs, outputs and versions with OUT/stf.lock.json, and look at all weights.

    Exits with 0 when nothing has changed, with 3 when something has. Paths of models are those of
    the recipe: a relative one is taken from the current folder.
    """
    if ray_address and not rebuild:
        raise click.UsageError("--ray is for --rebuild")
    lock = read_lock(out_path)
    found = list(find_differences(lock, out_path, transformers_cache))
    if rebuild and not found:
        options = lock.options.restore(transformers_cache, trust_remote_code)
        options = options.model_copy(update={"num_threads": lock.threads})
        with open_executor(ray_address, options) as runs:
            found = _rebuilt(lock, out_path, scratch, transformers_cache, trust_remote_code, runs)
    for line in found:
        echo(line)
    if found:
        echo(f"{out_path}: {len(found)} differences from {FILE_NAME}", err=True)
        raise SystemExit(DIFFERENT)
    inputs = sum(len(model.files) for model in lock.models)
    again = ", and merged again to the same bytes" if rebuild else ""
    echo(f"{out_path}: {inputs} input and {len(lock.outputs)} output files verified{again}")
    weights = lock.check.summary if lock.check else "all values are finite"
    echo(f"{out_path}: {weights}")


def _rebuilt(
    lock: Lock,
    out: Path,
    scratch: Path | None,
    cache: str | None,
    trust: bool,
    runs: Executor | None,
) -> list[str]:
    from mergekit_stf.host.run.rebuild import rebuild

    if lock.options.trust_remote_code and not trust:
        raise STFError(f"{out} was merged with --trust-remote-code; say so here to rebuild it")
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="stf-verify-") as folder:
            again = rebuild(lock, Path(folder) / out.resolve().name, cache, trust, runs)
    except (KeyboardInterrupt, Terminated) as error:
        raise type(error) from None  # what it says of the scratch folder went with that
    before = {record.name: record.sha256 for record in lock.outputs}
    after = {record.name: record.sha256 for record in again.outputs}
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return [f"rebuilt {name}: other bytes" for name in names]
