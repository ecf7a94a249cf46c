"""All figures of a report, by section of the page."""

from __future__ import annotations

from mergekit_stf.report.canvas import Plot
from mergekit_stf.report.facts import Report
from mergekit_stf.report.preservation_plots import preservation_plots
from mergekit_stf.report.record_plots import alpha, heat_map, memory, seconds, spectra


def plots(report: Report) -> dict[str, list[Plot]]:
    """Draw every figure for which a report has data."""
    several = len(report.labels) > 1
    decomposed = [record for record in report.linear if record.spectra]
    corrected = [record for record in decomposed if record.alpha_ratio]
    sections: dict[str, list[Plot]] = {
        "preservation": list(preservation_plots(report.preservation)),
        "interference": [heat_map(report)] if several and report.comparable else [],
        "spectra": [spectra(decomposed)] if decomposed else [],
        "alpha": [alpha(corrected)] if corrected else [],
        "cost": [seconds(report.records), *memory(report.records)] if report.records else [],
    }
    return {name: drawn for name, drawn in sections.items() if drawn}
