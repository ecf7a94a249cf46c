"""Every engine benchmark runs, at a size where that takes seconds, and checks its answers."""

import importlib
import json
import runpy
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.cluster import clusters

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
LLAMA = ["--hidden", "64", "--inner", "128", "--layers", "2", "--vocabulary", "100"]
SMALL = {
    "accuracy": ["--shapes", "96x64", "--runs", "1"],
    "single_weight": ["--shapes", "96x96", "64x128", "--runs", "1"],
    "model_shapes": ["tiny", "--rival", "1"],
    "scaling": ["--size", "32", "--tasks", "2", "4", "--runs", "1"],
    "truncation": ["--size", "288", "--error-size", "288", "--ranks", "0.1", "--runs", "1"],
    "memory": ["--shapes", "128x96x3", "--route", "gram_refined"],
    "whole_merge": [*LLAMA, "--runs", "1"],
    "safety": [*LLAMA, "--runs", "1"],
    "tools": [*LLAMA, "--runs", "1"],
    "cluster_simulation": ["--only", "Llama"],
    "removals": ["--tiny", "--only", "pool", "--before", str(ROOT), "--runs", "1"],
    "trimming": ["--sizes", "300", "--runs", "1"],
}


def run(name, options, monkeypatch):
    """Run a benchmark in this process, and the programs that it starts in forked ones.

    A command that is a Python file is started as the benchmark would, and so is what ``safety``
    starts, which counts the CPU time of its children.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    harness = importlib.import_module("harness")
    if name != "safety":
        monkeypatch.setattr(harness, "peak_of", partial(forked, harness.peak_of))
    script = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")


def forked(peak_of, command):
    program, *arguments = command
    if Path(program).name not in ("mergekit-yaml", "mergekit-stf"):
        return peak_of(command)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code, said = processes.run(*arguments, program=Path(program).name, log=log)
    assert code == 0, said
    return time.perf_counter() - started, 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark(name, tmp_path, monkeypatch, capsys):
    written = tmp_path / "figures.json"
    run(name, [*SMALL[name], "--json", str(written)], monkeypatch)
    assert json.loads(written.read_text())["machine"]["torch"]
    assert capsys.readouterr().out


@clusters.needs_ray
@pytest.mark.slow
def test_the_benchmark_of_a_cluster(monkeypatch, capsys):
    run("cluster", [*LLAMA, "--runs", "1"], monkeypatch)
    assert "two workers" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as the benchmark does: PEFT and transformers
def test_adapters_merged_from_factors_are_what_full_copies_give(tmp_path, monkeypatch, capsys):
    written = tmp_path / "figures.json"
    options = [*LLAMA, "--rank", "2", "--size", "0.05", "--json", str(written)]
    run("lora", options, monkeypatch)
    assert json.loads(written.read_text())["errors"].keys() == {"weights", "updates", "adapter"}
    assert "answers agree" in capsys.readouterr().out


def test_the_rounding_of_full_copies_is_measured(tmp_path, monkeypatch):
    """The smaller the update, the more of it a copy in bfloat16 loses, and the factors nothing."""
    written = tmp_path / "figures.json"
    options = ["--side", "64", "--rank", "2", "--json", str(written)]
    run("lora_rounding", options, monkeypatch)
    rows = json.loads(written.read_text())["rows"]
    assert max(row["factors"] for row in rows) < 1e-12
    assert all(rows[-1][dtype] > 3 * rows[0][dtype] > 0 for dtype in ("float32", "bfloat16"))


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
    options = ["--source", "bfloat16", "--size", "288", "--tasks", "2", "--runs", "1"]
    run("scaling", options, monkeypatch)
    assert "steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--rank", "0.2"], ["--route", "gram_refined", "--beside"], ["--route", "gram_float32"]],
)
def test_the_benchmark_for_a_card_runs_on_a_cpu(options, monkeypatch, capsys):
    run("model_shapes", ["tiny", "--fraction", "0.5", *options], monkeypatch)
    assert "all matrices" in capsys.readouterr().out
