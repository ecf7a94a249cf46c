"""No control character of a file, a path, a lock or a log reaches the terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mergekit_stf.cli.common.terminal import EscapingStream, echo, echo_json, escape_streams
from tests import processes
from tests.cli.merges import run, tiny_models, write_recipe
from tests.environments import PACKAGE
from tests.host import peft_adapters as peft

HOSTILE = "\x1b]0;own\x07\x9b31m\u202e"
ESCAPED = "\\x1b]0;own\\x07\\x9b31m\\u202e"

Arguments = tuple[object, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of three models with its lock, and a recipe over an adapter."""
    root = tmp_path_factory.mktemp("made")
    models = tiny_models(root / "models")
    write_recipe(root / "r.yml", models)
    adapter = peft.save_adapter(models.base, root / "adapter", 1, target_modules=["q_proj"])
    peft.write(peft.recipe(models.base, peft.on_base(models.base, [adapter])), root / "l.yml")
    assert run("merge", root / "r.yml", root / "out", "--quiet").exit_code == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it, whose recipes name the copied models."""
    shutil.copytree(made, tmp_path / "root")
    for recipe in ("r.yml", "l.yml"):
        path = tmp_path / "root" / recipe
        path.write_text(path.read_text().replace(str(made), str(tmp_path / "root")))
    return tmp_path / "root"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(path), name: tensor}, path, {"format": "pt"})


def in_lock(root: Path, change: Callable[[dict[str, Any]], object]) -> Arguments:
    edit(root / "out" / "stf.lock.json", change)
    return "verify", root / "out"


def lock_key(root: Path) -> Arguments:
    return in_lock(root, lambda lock: lock.update({HOSTILE: 1}))


def lock_version(root: Path) -> Arguments:
    return in_lock(root, lambda lock: lock["versions"].update(torch=HOSTILE))


def lock_model(root: Path) -> Arguments:
    return in_lock(root, lambda lock: lock["models"][0].update(reference=HOSTILE))


def name_in_output(root: Path) -> Arguments:
    (root / "out" / HOSTILE).touch()
    return "verify", root / "out"


def line_in_output(root: Path) -> Arguments:
    (root / "out" / f"x\nout: 9 input and 4 output files verified{HOSTILE}").touch()
    return "verify", root / "out"


def path_of_output(root: Path) -> Arguments:
    return "verify", (root / "out").rename(root / HOSTILE)


def name_of_weight(root: Path) -> Arguments:
    for model in ("base", "tuned1"):  # the class has no use for it, and it is kept, aloud
        add_tensor(root / "models" / model / "model.safetensors", HOSTILE, torch.ones(1))
    return "merge", root / "r.yml", root / "new"


def shard(root: Path) -> Arguments:
    path = root / "models" / "tuned1" / "model.safetensors"
    path.with_name("model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": f"{HOSTILE}.safetensors"}})
    )
    path.unlink()
    return "plan", root / "r.yml"


def class_of_model(root: Path) -> Arguments:
    for folder in (root / "models").iterdir():
        edit(folder / "config.json", lambda config: config.update(architectures=[HOSTILE]))
    return "plan", root / "r.yml"


def type_of_model(root: Path) -> Arguments:
    for folder in (root / "models").iterdir():
        edit(folder / "config.json", lambda config: config.update(model_type=HOSTILE))
    return "plan", root / "r.yml"


def in_adapter(root: Path, **changes: object) -> Arguments:
    edit(root / "adapter" / "adapter_config.json", lambda config: config.update(changes))
    return "lora", root / "l.yml", root / "new"


def rank_pattern(root: Path) -> Arguments:
    return in_adapter(root, rank_pattern={HOSTILE: -1})


def adapter_key(root: Path) -> Arguments:
    return in_adapter(root, **{HOSTILE: 1})


def adapter_tensor(root: Path) -> Arguments:
    add_tensor(root / "adapter" / "adapter_model.safetensors", HOSTILE, torch.ones(1))
    return "lora", root / "l.yml", root / "new"


def path_of_recipe(root: Path) -> Arguments:
    return "plan", root / HOSTILE


def recipe_key(root: Path) -> Arguments:
    text = (root / "r.yml").read_text()
    (root / "r.yml").write_text(f"{text}{json.dumps(HOSTILE)}: 1\n")
    return "plan", root / "r.yml"


def folder_of_model(root: Path) -> Arguments:
    tuned = (root / "models" / "tuned1").rename(root / "models" / HOSTILE)
    (tuned / "model.safetensors").unlink()
    text = (root / "r.yml").read_text().replace(f"{root}/models/tuned1", json.dumps(str(tuned)))
    (root / "r.yml").write_text(text)
    return "plan", root / "r.yml"


def option(root: Path) -> Arguments:
    return "sweep", root / "r.yml", root / "new", "--lambda", HOSTILE


SOURCES = [
    lock_key, lock_version, lock_model, name_in_output, line_in_output, path_of_output,
    name_of_weight, shard, class_of_model, type_of_model, rank_pattern, adapter_key, adapter_tensor,
    path_of_recipe, recipe_key, folder_of_model, option,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_no_source_reaches_the_terminal(root: Path, source: Callable[[Path], Arguments]) -> None:
    said = processes.run(*source(root), log=root / "said")[1]
    assert ESCAPED in said.replace("\\\\", "\\")
    assert [c for c in said if not c.isprintable() and c not in "\n\r"] == []
    assert "\nout: 9 input and 4 output files verified" not in said


def test_one_line_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"a\nb\tc\r{HOSTILE} ü×")
    echo("\udcff", err=True)
    assert capsys.readouterr() == (f"a\\nb\\tc\\r{ESCAPED} ü×\n", "\\udcff\n")


class Model(BaseModel):
    text: str
    number: float


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json(Model(text=HOSTILE, number=math.nan))
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == {"text": HOSTILE, "number": None}


def stream(encoding: str = "utf-8") -> tuple[EscapingStream, Callable[[], str]]:
    inner = io.TextIOWrapper(io.BytesIO(), encoding, newline="", write_through=True)
    return EscapingStream(inner), lambda: inner.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_the_log_of_the_host_is_escaped() -> None:
    guard, said = stream()
    handler = logging.StreamHandler(guard)
    handler.emit(logging.LogRecord("mergekit", 30, "", 0, f"{HOSTILE}\r%s", ("x\ny",), None))
    assert said() == f"{ESCAPED}\\rx\ny\n"


def test_a_progress_bar_still_draws_and_its_text_is_escaped() -> None:
    (guard, said), (plain, expected) = stream(), stream()
    for file, name in ((guard, HOSTILE), (plain._stream, ESCAPED)):
        options: dict[str, Any] = {
            "file": file,
            "mininterval": 0,
            "ncols": 100,
            "bar_format": "{desc}|{n}",
        }
        for _ in tqdm(range(3), desc="outer", position=1, leave=False, **options):
            for _ in tqdm(range(2), desc=name, **options):
                pass
    assert "\x1b[A" in expected()
    assert said() == expected()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped_too(encoding: str) -> None:
    guard, said = stream(encoding)
    guard.writelines(["a → b\n", "\udcff"])
    assert said() == "a \\u2192 b\n\\udcff"


def test_the_streams_come_back() -> None:
    before = sys.stdout, sys.stderr
    with escape_streams():
        assert (sys.stdout, sys.stderr) != before
        assert sys.stdout.isatty() is before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(ZeroDivisionError), escape_streams():
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before


def test_commands_print_in_one_place() -> None:
    package = PACKAGE / "cli"
    for path in sorted(set(package.rglob("*.py")) - {package / "common" / "terminal.py"}):
        text = path.read_text(encoding="utf-8")
        assert "click.echo" not in text, path
        assert "print(" not in text, path
