"""``mergekit-stf doctor``: what is installed, what is live, what is missing.

What it needs is imported when it runs, so that help and completion answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from mergekit_stf.cli.common.terminal import echo, echo_json

if TYPE_CHECKING:
    from mergekit_stf.host.plugin.health import Health


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Say what is installed, what mergekit knows of it, and which route the engine takes.

    Measures each device for half a second. Exits with 0 when merges work, with 1 when something
    keeps them from working; every problem comes with its remedy.

    \b
    Example:
      mergekit-stf doctor
    """
    from mergekit_stf.host.plugin.health import examine_installation

    health = examine_installation()
    if as_json:
        echo_json(health)
    else:
        for line in _lines(health):
            echo(line)
    if health.problems:
        raise click.exceptions.Exit(1)


def _lines(health: Health) -> Iterator[str]:
    yield f"Python       {health.python}"
    yield f"System       {health.system}, {health.threads} torch threads"
    for package, version in health.versions.items():
        yield f"{package:<12} {version or 'not installed'}"
    yield ""
    yield f"known to mergekit      {', '.join(health.methods) or 'NONE of our methods'}"
    yield f"found by mergekit-yaml {'yes' if health.autoload else 'NO'}"
    for path in health.hook_files:
        yield f"  through {path}"
    tables = "ours beside mergekit's" if health.tables else "mergekit's alone"
    yield f"architecture tables    {tables}"
    yield ""
    for device in health.devices:
        yield f"{device.name}: {device.description}"
        yield f"  float32 {device.float32:,.0f} GFLOP/s, float64 {device.float64:,.0f} GFLOP/s"
        for dtype, route in device.routes.items():
            yield f"  {dtype} checkpoints: {route}"
    yield ""
    yield from (f"missing: {item}" for item in health.missing)
    yield from (f"problem: {item}" for item in health.problems)
    if not health.problems:
        yield "No problem found."
