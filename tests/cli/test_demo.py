"""The demo at a small scale: every figure recomputed, every refusal read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_stf.cli import demo
from mergekit_stf.cli.common.errors import INTERRUPTED, WRONG
from mergekit_stf.cli.main import main
from mergekit_stf.core.errors import STFError
from mergekit_stf.demo import corpus as demo_corpus
from mergekit_stf.demo import merging as demo_merging
from mergekit_stf.demo import run as demo_run
from mergekit_stf.demo import texts as demo_texts
from mergekit_stf.demo.corpus import Split, corpus, encode, split_documents
from mergekit_stf.demo.models import build_models, byte_tokenizer
from mergekit_stf.demo.run import Results
from mergekit_stf.demo.texts import KINDS
from mergekit_stf.demo.training import Settings, rows_for_specialist

KINDS_OF_DEMO = ("python", "prose", "unicode")
SHORT = Settings(
    kinds=("prose", "unicode"), hidden=16, layers=1, heads=2, context=32, batch=4, base_steps=4,
    specialist_steps=3, windows=4, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("demo") / "stf-demo"
    result = CliRunner().invoke(main, ["demo", str(root), "--quick", "--seed", "3"])
    assert result.exit_code == 0, result.output
    return root, result


def losses_in_float64(path: Path, settings: Settings, split: Split = "test") -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(path).double()
    return {kind: loss_in_float64(model, corpus(kind)[split], settings) for kind in settings.kinds}


def loss_in_float64(model: torch.nn.Module, text: torch.Tensor, settings: Settings) -> float:
    width = settings.context + 1
    fit = len(text) // width
    count = min(settings.windows, fit)
    bits = 0.0
    for window in range(count):
        start = (window * fit // count) * width
        tokens = text[start : start + width]
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1]).logits[0]
        shares = logits.log_softmax(-1)[torch.arange(width - 1), tokens[1:]]
        bits -= float(shares.mean()) / math.log(2)
    return bits / count


@pytest.mark.slow
def test_every_printed_loss_is_the_loss_of_the_checkpoint(finished: tuple[Path, Result]) -> None:
    root, result = finished
    rows = {
        line.split()[0]: [float(x) for x in re.findall(r"\d+\.\d{3}\b", line)]
        for line in result.stdout.splitlines()
        if re.search(r"(\d+\.\d{3}\s*){4}$", line)
    }
    assert list(rows) == [
        "base",
        *KINDS_OF_DEMO,
        "linear",
        "task_arithmetic",
        "ties",
        "stf",
        "wudi",
    ]
    for name, printed in rows.items():
        folder = "merged" if name in demo_merging.METHODS else "models"
        expected = losses_in_float64(root / folder / name, Settings.tiny())
        assert printed == pytest.approx(
            [*expected.values(), sum(expected.values()) / 3], abs=6e-4
        ), name


@pytest.mark.slow
def test_measure_prints_validation_losses_and_their_mean_last(
    finished: tuple[Path, Result],
) -> None:
    path = finished[0] / "merged" / "stf"
    result = CliRunner().invoke(main, ["demo", "--quick", "--measure", str(path)])
    expected = losses_in_float64(path, Settings.tiny(), "validation")
    printed = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, _ in printed] == [*KINDS_OF_DEMO, "mean"]
    assert [float(figure) for _, figure in printed] == pytest.approx(
        [*expected.values(), sum(expected.values()) / 3], abs=6e-5
    )


@pytest.mark.slow
def test_specialists_win_on_their_own_text(finished: tuple[Path, Result]) -> None:
    root, result = finished
    losses = json.loads((root / "results.json").read_text())["bits_per_byte"]
    for kind in KINDS_OF_DEMO:
        others = [losses[name][kind] for name in ("base", *KINDS_OF_DEMO) if name != kind]
        assert losses[kind][kind] < min(others)
    assert "Each specialist is the best unmerged model on its own text." in result.stdout


@pytest.mark.slow
def test_the_picture_is_of_the_figures_and_progress_is_one_line(
    finished: tuple[Path, Result],
) -> None:
    root, result = finished
    losses = json.loads((root / "results.json").read_text())["bits_per_byte"]
    bars = dict(re.findall(r"^(\w+)[^█\n]*(█*)░* +-?\d+%$", result.stdout, re.MULTILINE))
    assert list(bars) == list(demo_merging.METHODS)
    for method, bar in bars.items():
        shares = [
            (losses["base"][kind] - losses[method][kind])
            / (losses["base"][kind] - losses[kind][kind])
            for kind in KINDS_OF_DEMO
        ]
        assert abs(len(bar) - 32 * sum(shares) / 3) <= 0.51
    (line,) = (line for line in result.stderr.splitlines() if "prose" in line)
    assert line == "base, python, prose, unicode, measuring, merging"
    assert result.stdout.startswith("A tiny language model is tuned on 3 kinds of text")


@pytest.mark.slow
def test_merges_are_what_their_recipes_say(finished: tuple[Path, Result]) -> None:
    root, _ = finished
    base = load_file(root / "models/base/model.safetensors")
    tuned = [load_file(root / f"models/{kind}/model.safetensors") for kind in KINDS_OF_DEMO]
    for method in ("linear", "task_arithmetic"):
        scale = yaml.safe_load((root / f"recipes/{method}.yml").read_text())
        factor = scale["parameters"]["lambda"] if method == "task_arithmetic" else 1 / 3
        merged = load_file(root / f"merged/{method}/model.safetensors")
        assert merged.keys() == base.keys()
        for name, weight in base.items():
            change = sum(t[name].double() - weight.double() for t in tuned)
            torch.testing.assert_close(merged[name].double(), weight + factor * change)


@pytest.mark.slow
def test_names_files_that_exist_and_recipes_that_run_from_the_directory(
    finished: tuple[Path, Result],
) -> None:
    root, result = finished
    named = re.findall(rf"  ({re.escape(str(root))}\S+)", result.stdout.partition("Look at")[2])
    assert len(named) == 3
    assert all(Path(path).exists() for path in named)
    assert not list(root.glob("**/*.partial"))
    again = subprocess.run(
        [sys.executable, "-m", "mergekit.scripts.run_yaml", "recipes/stf.yml", "merged/again"],
        cwd=root, capture_output=True, text=True, env={**os.environ, **demo_merging.ENVIRONMENT},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    first = (root / "merged/stf/model.safetensors").read_bytes()
    assert (root / "merged/again/model.safetensors").read_bytes() == first


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = build_models(tmp_path / "a", SHORT, seed=1)
    second = build_models(tmp_path / "b", SHORT, seed=1)
    other = build_models(tmp_path / "c", SHORT, seed=2)
    assert list(first) == ["base", "prose", "unicode"]
    for name in first:
        weights = [p[name] / "model.safetensors" for p in (first, second, other)]
        a, b, c = (path.read_bytes() for path in weights)
        assert a == b
        assert a != c


def test_a_specialist_reads_its_own_kind_and_rehearses_background() -> None:
    settings = dataclasses.replace(SHORT, background=("json", "html"), rehearsal=3)
    rows = itertools.islice(rows_for_specialist("prose", settings), 7)
    assert list(rows) == ["prose", "prose", "json", "prose", "prose", "html", "prose"]
    plain = rows_for_specialist("prose", dataclasses.replace(SHORT, rehearsal=0))
    assert set(itertools.islice(plain, 100)) == {"prose"}


def test_training_leaves_the_callers_threads_and_random_state(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    build_models(tmp_path, SHORT)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_of_text_stands_in_two_splits(kind: str) -> None:
    border = {"html": r"\n(?=<dt)", "json": r"\n", "unicode": r"\n"}.get(kind, r"\n\s*\n")
    parts = [
        {" ".join(block.split()) for text in texts for block in re.split(border, text)} - {""}
        for texts in split_documents(kind).values()
    ]
    assert all(len(part) > 50 for part in parts)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not parts[first] & parts[second]


@pytest.mark.slow
def test_text_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib, itertools; from mergekit_stf.demo.texts import KINDS;"
        "text = [b() for k in ('bytecode', 'json') for _, b in itertools.islice(KINDS[k](), 40)];"
        "print(hashlib.sha256(repr(text).encode('utf8', 'replace')).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_token_ids_are_bytes(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def naïve(x):\n\treturn '日本' + \"€\"  # 𐓒"
    assert tokenizer(text).input_ids == list(text.encode()) == encode(text).tolist()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == demo_corpus.VOCABULARY


def test_refuses_a_directory_with_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert result.exit_code == WRONG
    assert "is not empty" in result.stderr
    assert "--force" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def stopped_while_merging(root: Path, methods: list[str]) -> None:
    raise KeyboardInterrupt


def test_interrupt_says_what_is_complete_and_force_keeps_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("notes.txt", "models/old", "models/base.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(demo.Settings, "tiny", lambda: SHORT)
    monkeypatch.setattr(demo_run, "MergekitYaml", stopped_while_merging)
    for _ in range(2):
        result = CliRunner().invoke(main, ["demo", str(tmp_path), "--quick", "--force"])
        assert result.exit_code == INTERRUPTED
        (line,) = (line for line in result.stderr.splitlines() if "Interrupted. " in line)
        assert "models/base, models/base.py, models/old, models/prose, models/unicode." in line
        assert f"mergekit-stf demo {tmp_path} --force" in line
        for name in ("notes.txt", "models/old", "models/base.py"):
            assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["models/base", "merged/stf", "results.json"])
def test_force_replaces_nothing_that_no_demo_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = CliRunner().invoke(main, ["demo", str(tmp_path), "--quick", "--force"])
    assert result.exit_code == WRONG
    assert f"{name} was not written by a demo, so --force leaves it alone" in result.stderr
    assert (tmp_path / name).read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


@pytest.mark.slow
def test_a_failed_merge_shows_what_mergekit_said(tmp_path: Path) -> None:
    demo_merging.write_recipe(tmp_path, "linear", ("absent",))
    said = r"mergekit-yaml recipes/linear.* ended with 1: .*absent"
    merging = demo_merging.MergekitYaml(tmp_path, ["linear"])
    with merging, pytest.raises(STFError, match=said):
        list(merging.finished())
    assert not (tmp_path / "merged" / "linear").exists()


def test_a_python_without_its_source_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_texts, "library", lambda: tmp_path)
    demo_texts._sources.cache_clear()
    try:
        with pytest.raises(STFError, match="holds 0 source files of the standard library"):
            split_documents("python")
    finally:
        demo_texts._sources.cache_clear()


def test_a_python_without_help_topics_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(STFError, match=r"lacks pydoc_data\.topics"):
        split_documents("prose")


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(STFError, match="'poetry': choose from python, prose"):
        split_documents("poetry")


def test_a_specialist_that_is_beaten_is_named() -> None:
    losses = {"base": {"a": 2.0, "b": 2.0}, "a": {"a": 1.0, "b": 3.0}, "b": {"a": 3.0, "b": 2.0}}
    results = Results(
        seed=0, settings={"kinds": ["a", "b"]}, parameters={}, bits_per_byte=losses, seconds={},
        versions={},
    )  # fmt: skip
    assert results.beaten_specialists() == ["b"]
