"""``mergekit-stf report``: one HTML file that shows what a merge did."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.finished import Finished
from mergekit_stf.host.preservation import Preservation, measure

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
    each task are preserved (by stf and, on the same inputs, by linear, task_arithmetic and
    ties), how tasks interfere, spectra, corrections, time, memory, and a table of all weights.
    The figures are written as PNGs beside it.

    The input models are read one weight at a time; run it where the recipe's paths are valid.

    \b
    Examples:
      mergekit-stf report merged/
      mergekit-stf report merged/ --sample 0
    """
    _require_extra()
    from mergekit_stf.cli._report.facts import build
    from mergekit_stf.cli._report.page import render
    from mergekit_stf.cli._report.plots import plots

    finished = Finished(out)
    records = finished.records(diagnostics)
    measured = _measure(finished, sample, device, quiet) if sample else []
    report = build(finished.name, finished.text, records, measured)
    sections = plots(report)
    output = output or out / "stf-report.html"
    figures = output.with_suffix("")
    try:
        figures.mkdir(parents=True, exist_ok=True)
        output.write_text(render(report, sections), encoding="utf-8")
        for plot in (plot for drawn in sections.values() for plot in drawn):
            (figures / f"{plot.name}.png").write_bytes(plot.light)
    except OSError as error:
        raise STFError(f"cannot write the report {output}: {error.strerror}") from error
    click.echo(f"{output}: {len(records)} weights, {len(report.notices)} warnings")
    click.echo(f"{figures}/: the figures as PNGs")


def _require_extra() -> None:
    absent = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if absent:
        names = " and ".join(absent)
        raise STFError(f"the report needs {names}: pip install 'mergekit-stf[report]'")


def _measure(finished: Finished, sample: int, device: str, quiet: bool) -> Sequence[Preservation]:
    from mergekit_stf.cli._report.sample import spread

    weights = {weight.name: weight for weight in finished.weights()}
    superposed = [name for name, weight in weights.items() if weight.rule == "superpose"]
    chosen = spread(superposed, sample)
    return [
        measure(weights[name], finished.weight(name), device)
        for name in tqdm(chosen, desc="Measuring preservation", unit="weight", disable=quiet)
    ]
