"""The tools one after another on the demo's models, as its last lines tell the user to go on."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from mergekit_stf.demo.models import build_models
from mergekit_stf.demo.training import Settings
from mergekit_stf.host.diagnostics.finished import Finished
from mergekit_stf.host.diagnostics.preservation import RIVALS, measure_preservation
from tests.cli.merges import run, write_recipe
from tests.host.models import Checkpoints

START = "from mergekit_stf.cli.main import main; main()"


@pytest.mark.slow
def test_plan_merge_report_sweep_and_verify(tmp_path: Path) -> None:
    base, *tuned = build_models(tmp_path / "models", Settings.tiny()).values()
    models = Checkpoints(base, tuple(tuned))
    recipe = write_recipe(tmp_path / "stf.yml", models, **{"lambda": 0.6})
    out, points = tmp_path / "merged", tmp_path / "sweep"

    plan = run("plan", recipe, "--probe", "--json")
    assert plan.exit_code == 0, plan.output
    assert [row["weights"] for row in json.loads(plan.stdout)["rules"]] == [5, 2, 14]
    assert all(0 < pair["cosine"] < 0.9 for pair in json.loads(plan.stdout)["probe"]["pairs"])

    assert run("merge", recipe, out, "--quiet").exit_code == 0
    finished = Finished(out)
    superposed = [weight for weight in finished.weights() if weight.rule == "superpose"]
    measured = [measure_preservation(weight, finished.weight(weight.name)) for weight in superposed]
    assert all(found.error["stf"] < 1e-5 * found.mean_square for found in measured)
    assert all(found.error[r] > 1e-2 * found.mean_square for found in measured for r in RIVALS)

    report = run("report", out, "--quiet")
    assert report.exit_code == 0, report.output
    assert (out / "stf-report.html").stat().st_size > 100_000
    assert run("verify", out).exit_code == 0
    again = run("verify", out, "--rebuild")
    assert again.exit_code == 0, again.output
    assert "files verified, and merged again to the same bytes\n" in again.stdout

    score = f"{sys.executable} -c '{START}' demo --measure {{out}}"
    sweep = run(
        "sweep", recipe, points, "--lambda", "0.3,0.6", "--eval", score, "--lower-is-better"
    )
    assert sweep.exit_code == 0, sweep.output
    rows = list(csv.DictReader((points / "sweep.csv").read_text("utf-8").splitlines()))
    best = min(rows, key=lambda row: float(row["score"]))
    assert f"lambda: {best['lambda']}" in (points / "best.yml").read_text("utf-8")
    same = (points / "lambda-0.6" / "model.safetensors").read_bytes()
    assert same == (out / "model.safetensors").read_bytes()
