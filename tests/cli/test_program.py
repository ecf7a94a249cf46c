"""The program itself: how it is started, and how it ends when it is interrupted or not read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mergekit_stf import __version__
from mergekit_stf.cli import plan, verify
from mergekit_stf.cli.common import points
from mergekit_stf.host.outputs import workspace
from mergekit_stf.host.planning import plan as planning
from mergekit_stf.host.run import lora as adapter_run
from mergekit_stf.host.run import merge as merging
from mergekit_stf.report import write
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.models import Checkpoints
from tests.host.peft_adapters import save_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", models)


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "mergekit_stf", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mergekit-stf, version {__version__}\n"
    (script,) = entry_points(group="console_scripts", name="mergekit-stf")
    assert callable(script.load())


@pytest.mark.slow
def test_a_terminal_without_our_letters_gets_their_codes(recipe: Path) -> None:
    command = [sys.executable, "-m", "mergekit_stf", "plan", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 \\xd7 " in done.stdout


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_error(recipe: Path) -> None:
    command = [sys.executable, "-m", "mergekit_stf", "plan", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_that_swallows_a_signal_does_not_keep_the_program(number: int) -> None:
    code = f"""
import importlib, os
from mergekit_stf.cli.main import main
def import_module(name):
    try:
        os.kill(os.getpid(), {int(number)})
    except BaseException:
        pass
importlib.import_module = import_module
main(["plan"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + number
    assert done.stderr == ("Interrupted. Nothing is left half done; run the same command again.\n")


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int = 0) -> None:
    """Raise what Ctrl-C raises in a call of a function, after some calls of it."""
    original: Callable[..., Any] = getattr(module, name)
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)


def said(result: Result) -> str:
    """Return the one line of an interrupted command."""
    assert result.exit_code == 130, result.output
    (line,) = (line for line in result.stderr.splitlines() if "Interrupted" in line)
    assert line == result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    return line.partition("Interrupted. ")[2]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("input_models", "{out} is as it was; run the same command again to start anew."),
        ("preflight", "{out} is as it was; run the same command again to start anew."),
        ("make_card", "{out} is as it was; run the same command again to start anew."),
        (
            "make_lock",
            "What is finished lies in {out}.stf-work/store; run the same command again to resume.",
        ),
    ],
)
def test_an_interrupted_merge_says_what_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, merging, name)
        assert said(run("merge", recipe, out)) == kept.format(out=out)
    assert not out.exists()
    assert (tmp_path / "out.stf-work").exists() == (name == "make_lock")
    assert run("merge", recipe, out).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml"]


def test_an_interruption_after_the_publishing_says_that_all_is_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put = workspace.put_in_place

    def signalled(*arguments: Any) -> Path | None:
        signal.raise_signal(signal.SIGINT)
        return put(*arguments)

    monkeypatch.setattr(workspace, "put_in_place", signalled)
    assert said(run("merge", recipe, out)) == f"{out} is complete."
    assert run("verify", out).exit_code == 0


def test_an_interrupted_sweep_says_how_far_it_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    grid = ("sweep", recipe, out, "--lambda", "0.5,0.6")
    counted = f"1 of 2 points are finished in {out}; run the same command again to go on from here."
    with monkeypatch.context() as patch:
        interrupt(patch, merging, "make_lock", after=1)
        store = f"What is finished lies in {out}/.store; run the same command again to resume."
        assert said(run(*grid)) == f"{store} {counted}"
    with monkeypatch.context() as patch:
        interrupt(patch, points, "_row", after=1)
        assert said(run(*grid)) == counted
    assert run(*grid).exit_code == 0


def test_an_interrupted_merge_of_adapters_says_what_is_kept(
    models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(models.base, tmp_path / "adapter", 1, target_modules=["q_proj"])
    tuned = (Path(f"{models.base}+{adapter}"),)
    recipe = write_recipe(tmp_path / "recipe.yml", Checkpoints(models.base, tuned))
    for name in ("plan_adapters", "write_model", "make_card"):
        with monkeypatch.context() as patch:
            interrupt(patch, adapter_run, name)
            line = said(run("lora", recipe, tmp_path / "out"))
        assert line == f"{tmp_path}/out is as it was; run the same command again to start anew."
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "recipe.yml"]


def test_commands_that_only_read_leave_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("merge", recipe, out).exit_code == 0
    before = sorted(tmp_path.rglob("*"))
    for module, name, *arguments in (
        (plan, "load_recipe", "plan", recipe, "--out", out),
        (planning, "estimate_merge", "plan", recipe, "--out", out),
        (verify, "find_differences", "verify", out),
        (merging, "make_lock", "verify", out, "--rebuild", "--scratch", tmp_path),
        (write, "measure_preservation", "report", out),
        (write, "draw_plots", "report", out, "--sample", 0),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, module, name)
            line = said(run(*arguments))
        assert line == "Nothing is left half done; run the same command again."
        assert sorted(tmp_path.rglob("*")) == before
