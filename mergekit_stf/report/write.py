"""From a finished merge to its report on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import atomic_write, write_text
from mergekit_stf.host.diagnostics.finished import Finished
from mergekit_stf.host.diagnostics.preservation import Preservation, measure_preservation
from mergekit_stf.host.diagnostics.sample import spread
from mergekit_stf.host.run.network import stay_offline
from mergekit_stf.report.facts import build_report
from mergekit_stf.report.page import render
from mergekit_stf.report.plots import draw_plots


def write_report(
    out: Path, sample: int, output: Path | None, diagnostics: Path | None, device: str, quiet: bool
) -> Iterator[str]:
    """Write the page and its figures, and yield a line on each.

    A folder from elsewhere starts no download: models are looked for on this machine only.

    Args:
        out: the folder of the merge.
        sample: about how many weights to measure, 0 for none.
        output: the page, None for ``out/stf-report.html``.
        diagnostics: the records, None for those in ``out``.
        device: where to measure.
        quiet: show no progress.

    Raises:
        STFError: something of the merge is missing, or the page cannot be written.
    """
    finished = Finished(out)
    records = finished.records(diagnostics)
    with stay_offline():
        measured = _measure(finished, sample, device, quiet) if sample else []
        checked = finished.output_check()
    report = build_report(finished.name, finished.text, records, measured, *checked)
    sections = draw_plots(report)
    output = output or out / "stf-report.html"
    figures = output.with_suffix("")
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for plot in (plot for drawn in sections.values() for plot in drawn):
            with atomic_write(figures / f"{plot.name}.png") as temporary:
                temporary.write_bytes(plot.light)
        write_text(output, render(report, sections))
    except OSError as error:
        raise STFError(f"cannot write the report {output}: {error.strerror}") from error
    yield f"{output}: {len(records)} weights, {len(report.notices)} warnings"
    yield f"{figures}/: the figures as PNGs"


def _measure(finished: Finished, sample: int, device: str, quiet: bool) -> list[Preservation]:
    weights = {weight.name: weight for weight in finished.weights()}
    linear = [name for name, weight in weights.items() if weight.is_maps]
    chosen = spread(linear, sample)
    return [
        measure_preservation(weights[name], finished.weight(name), device)
        for name in tqdm(chosen, desc="Measuring preservation", unit="weight", disable=quiet)
    ]
