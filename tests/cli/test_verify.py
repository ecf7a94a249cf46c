"""``mergekit-stf verify`` finds every change, and nothing where nothing has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mergekit_stf.cli.main import main
from mergekit_stf.core import precision
from mergekit_stf.host.lock import text_digest
from tests.host.models import save_family


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    models = save_family("llama", root / "models", tasks=2)
    tuned = "".join(f"  - model: models/{model.name}\n" for model in models.tuned)
    text = f"merge_method: stf\nbase_model: models/{models.base.name}\nmodels:\n{tuned}"
    (root / "recipe.yml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = CliRunner().invoke(main, ["merge", "recipe.yml", "out"])
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def verify(*options: str) -> Result:
    return CliRunner().invoke(main, ["verify", "out", *options])


def edit_lock(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "out" / "stf.lock.json"
    lock = json.loads(path.read_text())
    change(lock)
    path.write_text(json.dumps(lock))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_nothing_has_changed(root: Path) -> None:
    result = verify()
    assert result.exit_code == 0, result.output
    assert result.output == (
        "out: 9 input and 5 output files verified\n"
        "out: 21 tensors fill 21 parameters of LlamaForCausalLM, and all values are finite\n"
    )


@pytest.mark.slow
def test_a_rebuild_in_a_fresh_process_with_another_hash_seed(root: Path) -> None:
    command = "from mergekit_stf.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "verify", "out", "--rebuild"],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "files verified, and merged again to the same bytes\n" in done.stdout


def test_a_rebuild_is_of_the_folder_that_a_link_names(root: Path) -> None:
    (root / "current").symlink_to("out")
    result = CliRunner().invoke(main, ["verify", "current", "--rebuild"])
    assert result.exit_code == 0, result.output


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda root: flip(root / "models/tuned1/model.safetensors", -1),
        "input models/tuned1: model.safetensors: other bytes",
    ),
    (
        lambda root: flip(root / "models/base/config.json", 5),
        "input models/base: config.json: other bytes",
    ),
    (
        lambda root: (root / "models/base/config.json").unlink(),
        "input models/base: config.json: missing",
    ),
    (
        lambda root: shutil.rmtree(root / "models/tuned2"),
        "input models/tuned2: not on this machine ([Errno 2]",
    ),
    (
        lambda root: flip(root / "out/model.safetensors", -1),
        "output model.safetensors: other bytes",
    ),
    (lambda root: (root / "out/README.md").write_text("x"), "output README.md: 1 bytes, was "),
    (lambda root: (root / "out/config.json").unlink(), "output config.json: missing"),
    (lambda root: (root / "out/evil.py").touch(), "output evil.py: not in the lock"),
    (
        lambda root: edit_lock(root, lambda lock: lock["versions"].update(torch="1.0")),
        "version of torch: merged with 1.0, here is",
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock["versions"].update(gone="2")),
        "version of gone: merged with 2, here is not installed",
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock.update(recipe="merge_method: ties")),
        "stf.lock.json: the recipe in it was changed",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[text for _, text in CHANGES])
def test_every_change_is_found(root: Path, change: Callable[[Path], object], expected: str) -> None:
    change(root)
    result = verify()
    assert result.exit_code == 3, result.output
    lines = result.output.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(expected)
    assert lines[1] == "out: 1 differences from stf.lock.json"


def test_a_rebuild_finds_what_a_forged_lock_hides(root: Path) -> None:
    def forge(lock: dict[str, Any]) -> None:
        lock["recipe"] += "parameters: {lambda: 0.5}\n"
        lock["recipe_sha256"] = text_digest(lock["recipe"])

    edit_lock(root, forge)
    assert verify().exit_code == 0
    result = verify("--rebuild")
    assert result.exit_code == 3
    assert "rebuilt model.safetensors: other bytes" in result.output


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return result.output


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "", ".", "..", "a\x00b", "c:\\x", "a\nb"]
)
@pytest.mark.parametrize("kind", ["outputs", "models"])
def test_names_in_a_lock_stay_inside_their_roots(root: Path, name: str, kind: str) -> None:
    def forge(lock: dict[str, Any]) -> None:
        files = lock["outputs"] if kind == "outputs" else lock["models"][0]["files"]
        files[0]["name"] = name

    edit_lock(root, forge)
    assert "is no file name inside" in refused(verify())


def test_a_link_out_of_the_output_is_not_followed(root: Path) -> None:
    path = root / "out" / "README.md"
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    assert "leads out of out through a link" in refused(verify())


def test_a_lock_starts_no_download(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    edit_lock(root, lambda lock: lock["models"][0].update(reference="a/b", commit="c" * 40))
    result = verify()
    assert result.exit_code == 3
    assert "input a/b: not on this machine" in result.output


def test_a_hub_model_is_found_by_its_commit(root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / ("c" * 40)
    shutil.copytree(root / "models" / "base", snapshot)
    edit_lock(root, lambda lock: lock["models"][0].update(reference="some/base", commit="c" * 40))
    assert verify("--transformers-cache", str(tmp_path / "hub")).exit_code == 0
    flip(snapshot / "config.json", 3)
    result = verify("--transformers-cache", str(tmp_path / "hub"))
    assert "input some/base: config.json: other bytes" in result.output


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "\xff"])
def test_a_damaged_lock(root: Path, text: str) -> None:
    (root / "out" / "stf.lock.json").write_text(text, encoding="latin-1")
    assert "stf.lock.json is damaged: " in refused(verify())


def test_no_lock(root: Path) -> None:
    (root / "out" / "stf.lock.json").unlink()
    assert "stf.lock.json: cannot be read: No such file" in refused(verify())


def test_a_lock_turns_on_no_remote_code(root: Path) -> None:
    edit_lock(root, lambda lock: lock["options"].update(trust_remote_code=True))
    assert "was merged with --trust-remote-code; say so here" in refused(verify("--rebuild"))


def test_a_rebuild_on_another_processor_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "the processor has other vector instructions"
    verify("--rebuild")
    assert said not in caplog.text
    machine = json.loads((root / "out" / "stf.lock.json").read_text())["machine"]
    known = "bfloat16" in machine["vectors"]
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: not known)
    verify("--rebuild")
    assert said in caplog.text


def test_a_rebuild_needs_the_same_device(root: Path) -> None:
    edit_lock(root, lambda lock: lock.update(device="NVIDIA H200"))
    assert "merged on NVIDIA H200, here is cpu; its bytes" in refused(verify("--rebuild"))


def test_damaged_options_in_a_lock(root: Path) -> None:
    edit_lock(root, lambda lock: lock["options"].update(out_shard_size="many"))
    assert "stf.lock.json: its options are damaged" in refused(verify("--rebuild"))
