"""The report's page: one HTML file with its figures, style and script inside."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_stf import __version__
from mergekit_stf.host.diagnostics.records import Record
from mergekit_stf.report.canvas import Plot
from mergekit_stf.report.facts import Report, strongest_cosine
from mergekit_stf.report.preservation_plots import methods_of

COLUMNS = (
    ("Weight", "text", "the weight's name in the checkpoint"),
    ("Rule", "text", "how it was merged"),
    ("Shape", "number", "rows × columns; sorted by number of entries"),
    ("Features", "number", "singular features in the system, over all tasks"),
    ("Condition", "number", "estimated condition number of G; near 1 is well posed"),
    ("Residual", "number", "‖Gα − s‖ / ‖s‖ after the solve"),
    (
        "Damping",
        "number",
        "eigenvalue of G below which contradictions were damped; 0 is the exact answer",
    ),
    ("‖M‖/‖ΣMᵢ‖", "number", "length of the merged matrix over that of the plain sum"),
    ("Max |cos|", "number", "strongest interference between two tasks"),
    ("Preservation", "number", "mean |⟨σu, M̄v − σu⟩| of the merge's method, where measured"),
    ("Seconds", "number", "time to merge it"),
)
"""Title, kind and meaning of every column of the table."""


def render(report: Report, sections: dict[str, list[Plot]]) -> str:
    """Return the page of a report; every name in it is escaped."""
    environment = Environment(
        loader=PackageLoader("mergekit_stf", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["figure"] = significant
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report,
        sections=sections,
        columns=COLUMNS,
        rows=_rows(report),
        tiles=_tiles(report),
        rules=Counter(record.rule for record in report.records),
        methods=methods_of(report.preservation) if report.preservation else [],
        version=__version__,
    )


def significant(value: float | None) -> str:
    """Write a number with three significant digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _tiles(report: Report) -> Sequence[tuple[str, str]]:
    records = report.records
    entries = sum(_entries(record) for record in records)
    tiles = [
        ("weights", f"{len(records):,}"),
        ("parameters", f"{entries / 1e6:,.1f} M" if entries >= 1e5 else f"{entries:,}"),
        ("tasks", str(len(report.labels))),
        ("features", f"{sum(sum(record.kept) for record in records):,}"),
        ("seconds", significant(sum(record.seconds for record in records))),
    ]
    peak = max((record.peak_rss or 0 for record in records), default=0)
    return [*tiles, ("peak memory", f"{peak / 1e9:.2f} GB")] if peak else tiles


def _rows(report: Report) -> list[list[tuple[str, Any]]]:
    """Return, for every weight, what each column shows and what it sorts by."""
    measured = {item.name: item.error[item.method] for item in report.preservation}
    return [_row(record, measured.get(record.name)) for record in report.records]


def _row(record: Record, preservation: float | None) -> list[tuple[str, Any]]:
    numbers = (
        sum(record.kept) if record.kept else None,
        record.condition,
        record.residual,
        record.cutoff,
        _ratio(record),
        strongest_cosine(record),
        preservation,
        record.seconds,
    )
    shape = " × ".join(map(str, record.shape)) or "scalar"
    return [
        (record.name, record.name),
        (record.rule, record.rule),
        (shape, _entries(record)),
        *((significant(number), "" if number is None else repr(number)) for number in numbers),
    ]


def _ratio(record: Record) -> float | None:
    if record.norm_merged is None or not record.norm_sum:
        return None
    return record.norm_merged / record.norm_sum


def _entries(record: Record) -> int:
    count = 1
    for side in record.shape:
        count *= side
    return count
