"""What was measured, as Markdown."""

from __future__ import annotations

import statistics
from typing import Any


def written(figures: dict[str, Any]) -> str:
    """Return a table of specialists, and one of methods for each case; means over seeds."""
    runs = [run for run in figures["runs"] if run and run["cases"]]
    if not runs:
        return "nothing was measured\n"
    machine = figures["machine"]
    lines = [
        f"{figures['bench']}, {figures['size']['name']}, seeds: {len(runs)}, "
        f"{machine['card'] or machine['processor']}, {figures['seconds']:.0f} s",
        "",
        "| specialist | base | specialist |",
        "|---|---|---|",
    ]
    for name in runs[0]["specialists"]:
        base = _mean([run["base"][name.split()[0]]["test"][0] for run in runs])
        alone = _mean([run["specialists"][name]["test"][0] for run in runs])
        lines.append(f"| {name} | {100 * base:.1f} | {100 * alone:.1f} |")
    for case, entry in runs[0]["cases"].items():
        lines += ["", f"{case}: {', '.join(entry['specialists'])}", "", *_head()]
        rows = []
        for label in entry["methods"]:
            found = [
                run["cases"][case]["methods"].get(label) for run in runs if case in run["cases"]
            ]
            measured = [each for each in found if each and "error" not in each]
            if measured:
                rows.append(_row(label, measured))
        lines += [row for _, row in sorted(rows, reverse=True)]
    return "\n".join(lines) + "\n"


def _head() -> list[str]:
    return [
        "| method | lambda | kept at the default | gain | best lambda | kept at the best | merge |",
        "|---|---|---|---|---|---|---|",
    ]


def _row(label: str, found: list[dict[str, Any]]) -> tuple[float, str]:
    default, best = ([each[key] for each in found] for key in ("default", "best"))
    kept = _mean([each["kept"] for each in default])
    scales = ", ".join(dict.fromkeys(f"{each['lambda']:g}" for each in best))
    return kept, (
        f"| {label} | {default[0]['lambda']:g} | {_spread([e['kept'] for e in default])} "
        f"| {100 * _mean([e['gain'] for e in default]):.1f} "
        f"| {scales} | {_spread([e['kept'] for e in best])} "
        f"| {_mean([e['seconds'] for e in found]):.1f} s |"
    )


def _spread(values: list[float]) -> str:
    shown = f"{100 * _mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * statistics.stdev(values):.1f}"


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)
