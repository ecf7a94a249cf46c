"""All figures of a report, by section of the page."""

from __future__ import annotations

from mergekit_stf.report.canvas import Plot
from mergekit_stf.report.facts import Report
from mergekit_stf.report.preservation_plots import draw_preservation
from mergekit_stf.report.record_plots import (
    draw_alpha,
    draw_heat_map,
    draw_memory,
    draw_seconds,
    draw_spectra,
)
from mergekit_stf.report.timeline import draw_timeline


def draw_plots(report: Report) -> dict[str, list[Plot]]:
    """Draw every figure for which a report has data."""
    several = len(report.labels) > 1
    decomposed = [record for record in report.linear if record.spectra]
    corrected = [record for record in decomposed if record.alpha_ratio]
    sections: dict[str, list[Plot]] = {
        "preservation": list(draw_preservation(report.preservation)),
        "interference": [draw_heat_map(report)] if several and report.comparable else [],
        "spectra": [draw_spectra(decomposed)] if decomposed else [],
        "alpha": [draw_alpha(corrected)] if corrected else [],
        "cost": [
            draw_seconds(report.records),
            *draw_memory(report.records),
            *draw_timeline(report.records),
        ]
        if report.records
        else [],
    }
    return {name: drawn for name, drawn in sections.items() if drawn}
