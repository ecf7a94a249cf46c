"""Every engine benchmark runs, at a size where that takes seconds, and checks its answers."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
SMALL = {
    "single_weight": ["--shapes", "96x96", "64x128", "--runs", "1"],
    "model_shapes": ["tiny", "--rival", "1"],
    "scaling": ["--size", "32", "--tasks", "2", "4", "--runs", "1"],
    "truncation": ["--size", "288", "--error-size", "288", "--ranks", "0.1", "--runs", "1"],
    "memory": ["--shapes", "128x96x3", "--route", "gram_refined"],
    "whole_merge": [
        *("--hidden", "64", "--inner", "128", "--layers", "2", "--vocabulary", "100"),
        *("--runs", "1"),
    ],
    "removals": ["--tiny", "--only", "pool", "--before", str(ROOT), "--runs", "1"],
    "trimming": ["--sizes", "300", "--runs", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    written = tmp_path / "figures.json"
    script = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *SMALL[name], "--json", str(written)])
    runpy.run_path(str(script), run_name="__main__")
    assert json.loads(written.read_text())["machine"]["torch"]
    assert capsys.readouterr().out


def test_a_missed_bound_is_an_error_that_loses_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    harness = importlib.import_module("harness")
    written = tmp_path / "figures.json"
    given = harness.parser("?").parse_args(["--json", str(written)])
    figures = {"kept": 1}
    harness.judge(figures, "time", 1.5, "at most", 1.5)
    harness.judge(figures, "gain", 3.0, "at least", 3)
    harness.finish(given, figures)
    harness.judge(figures, "slow", 1.51, "at most", 1.5)
    harness.judge(figures, "lame", 2.99, "at least", 3)
    with pytest.raises(SystemExit, match=r"^missed: slow, lame$"):
        harness.finish(given, figures)
    found = json.loads(written.read_text())
    assert found["kept"] == 1
    assert {what: bound["met"] for what, bound in found["bounds"].items()} == {
        "time": True,
        "gain": True,
        "slow": False,
        "lame": False,
    }
    assert capsys.readouterr().out.splitlines()[2:] == [
        "slow: 1.51, at most 1.5: MISSED",
        "lame: 2.99, at least 3: MISSED",
    ]


@pytest.mark.slow
def test_scaling_of_bfloat16_checkpoints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = FOLDER / "scaling.py"
    options = ["--source", "bfloat16", "--size", "288", "--tasks", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert "steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--rank", "0.2"], ["--route", "gram_refined", "--beside"], ["--route", "gram_float32"]],
)
def test_the_benchmark_for_a_card_runs_on_a_cpu(options, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = FOLDER / "model_shapes.py"
    monkeypatch.setattr(sys, "argv", [str(script), "tiny", "--fraction", "0.5", *options])
    runpy.run_path(str(script), run_name="__main__")
    assert "all matrices" in capsys.readouterr().out
