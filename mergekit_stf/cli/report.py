"""``mergekit-stf report``: one HTML file that shows what a merge did.

What it needs is imported when it runs, so that help and completion answer at once.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from mergekit_stf.cli.common.terminal import echo

EXTRA = ("jinja2", "matplotlib")
DEFAULT_SAMPLE = 48


@click.command("report", short_help="Write one HTML file that shows what a merge did.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=DEFAULT_SAMPLE,
    show_default=True,
    metavar="N",
    help="Measure the preservation of about N weights, every kind among them. "
    "0 reads no model; a number above that of the weights measures all.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page to write, its figures beside it.  [default: OUT/stf-report.html]",
)
@click.option(
    "--diagnostics",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The records of the merge, if not in OUT.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to measure.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    out: Path, sample: int, output: Path | None, diagnostics: Path | None, device: str, quiet: bool
) -> None:
    """Show what the merge in OUT did to every weight, as one HTML file.

    The page opens from disk, without a network: warnings first, then how well the features of
    each task are preserved (by the merge's method and, on the same inputs, by linear,
    task_arithmetic and ties), how tasks interfere, spectra, corrections, time, memory, and a
    table of all weights.
    The figures are written as PNGs beside it.

    The input models are read one weight at a time; run it where the recipe's paths are valid.

    \b
    Examples:
      mergekit-stf report merged/
      mergekit-stf report merged/ --sample 0
    """
    _require_extra()
    from mergekit_stf.report.write import write_report

    for line in write_report(out, sample, output, diagnostics, device, quiet):
        echo(line)


def _require_extra() -> None:
    absent = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if absent:
        from mergekit_stf.core.errors import STFError

        names = " and ".join(absent)
        raise STFError(f"the report needs {names}: pip install 'mergekit-stf[report]'")
